# Made from the cards by 'make generate'.
from assay.optim._sam import MaskPolicy as MaskPolicy
from assay.optim.ssam.ssam import DynamicMask as DynamicMask
from assay.optim.ssam.ssam import FisherMask as FisherMask
from assay.optim.ssam.ssam import RandomMask as RandomMask
from assay.optim.ssam.ssam import fisher_diagonal as fisher_diagonal
from assay.optim.ssam_structured.ssam_structured import nm_mask as nm_mask
from assay.optim.ssam_structured.ssam_structured import structured_mask as structured_mask
