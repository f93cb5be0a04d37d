# Made from the cards by 'make generate'.
from assay.optim.efficient_adam.efficient_adam import Identity as Identity
from assay.optim.efficient_adam.efficient_adam import LogQuantizer as LogQuantizer
from assay.optim.efficient_adam.efficient_adam import ScaledSign as ScaledSign
from assay.optim.efficient_adam.efficient_adam import TopK as TopK
from assay.optim.efficient_adam.efficient_adam import UniformQuantizer as UniformQuantizer
