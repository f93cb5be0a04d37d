# Made from the cards by 'make generate'.
from assay.optim.omd_sea.omd_sea import Ball as Ball
from assay.optim.omd_sea.omd_sea import Box as Box
from assay.optim.omd_sea.omd_sea import DynamicOMD as DynamicOMD
from assay.optim.omd_sea.omd_sea import OptimisticHedge as OptimisticHedge
from assay.optim.omd_sea.omd_sea import SEAEnvironment as SEAEnvironment
from assay.optim.omd_sea.omd_sea import Simplex as Simplex
from assay.optim.omd_sea.omd_sea import regret as regret
