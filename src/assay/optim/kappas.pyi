# Made from the cards by 'make generate'.
from assay.optim.lion_k.lion_k import HalfSquare as HalfSquare
from assay.optim.lion_k.lion_k import Huber as Huber
from assay.optim.lion_k.lion_k import Kappa as Kappa
from assay.optim.lion_k.lion_k import L1 as L1
from assay.optim.lion_k.lion_k import L2 as L2
from assay.optim.lion_k.lion_k import L2Rows as L2Rows
from assay.optim.lion_k.lion_k import LogCosh as LogCosh
from assay.optim.lion_k.lion_k import Lp as Lp
from assay.optim.lion_k.lion_k import Nuclear as Nuclear
from assay.optim.lion_k.lion_k import SoftThreshold as SoftThreshold
from assay.optim.lion_k.lion_k import TopK as TopK
