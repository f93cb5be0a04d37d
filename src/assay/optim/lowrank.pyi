# Made from the cards by 'make generate'.
from assay.optim._lowrank import Projector as Projector
from assay.optim._lowrank import RandomProjector as RandomProjector
from assay.optim._lowrank import SVDProjector as SVDProjector
from assay.optim.dct_lowrank.dct_lowrank import DCTProjector as DCTProjector
from assay.optim.dct_lowrank.dct_lowrank import LowRankAdamW as LowRankAdamW
from assay.optim.dct_lowrank.dct_lowrank import dct2 as dct2
from assay.optim.dct_lowrank.dct_lowrank import dct3 as dct3
from assay.optim.dct_lowrank.dct_lowrank import dct_matrix as dct_matrix
