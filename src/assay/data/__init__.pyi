# Made from the cards by 'make generate'.
from assay.data._indexed import IndexedDataset as IndexedDataset
from assay.data.grand_el2n.grand_el2n import ForgettingTracker as ForgettingTracker
from assay.data.grand_el2n.grand_el2n import PruningSampler as PruningSampler
from assay.data.grand_el2n.grand_el2n import ScoreSubset as ScoreSubset
from assay.data.grand_el2n.grand_el2n import average_scores as average_scores
from assay.data.grand_el2n.grand_el2n import el2n_scores as el2n_scores
from assay.data.grand_el2n.grand_el2n import grand_scores as grand_scores
from assay.data.grand_el2n.grand_el2n import keep_by_score as keep_by_score
from assay.data.grand_el2n.grand_el2n import margin_scores as margin_scores
from assay.data.unlearnable.unlearnable import Noise as Noise
from assay.data.unlearnable.unlearnable import error_minimizing_noise as error_minimizing_noise
from assay.data.unlearnable.unlearnable import pgd as pgd
from assay.data.unlearnable.unlearnable import random_crop_flip as random_crop_flip
from assay.data.unlearnable.unlearnable import robust_error_minimizing_noise as robust_error_minimizing_noise
from assay.data.unlearnable.unlearnable import robust_noise_step as robust_noise_step
from assay.losses.ecaml.ecaml import PairBatchSampler as PairBatchSampler
