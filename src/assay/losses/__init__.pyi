# Made from the cards by 'make generate'.
from assay.losses.ecaml.ecaml import ECAML as ECAML
from assay.losses.ecaml.ecaml import binomial_deviance as binomial_deviance
from assay.losses.ecaml.ecaml import energy_confusion as energy_confusion
from assay.losses.ecaml.ecaml import n_pair_loss as n_pair_loss
from assay.losses.ecaml.ecaml import triplet_margin_loss as triplet_margin_loss
from assay.losses.mw_loss.mw_loss import contrastive_loss as contrastive_loss
from assay.losses.mw_loss.mw_loss import mw_loss as mw_loss
from assay.losses.ps_kd.ps_kd import PSKD as PSKD
from assay.losses.ps_kd.ps_kd import pskd_schedule as pskd_schedule
from assay.losses.ps_kd.ps_kd import soft_target_cross_entropy as soft_target_cross_entropy
from assay.losses.utility_probability.utility_probability import decide as decide
from assay.losses.utility_probability.utility_probability import fit_temperature as fit_temperature
from assay.losses.utility_probability.utility_probability import revealed_preference_loss as revealed_preference_loss
from assay.losses.utility_probability.utility_probability import sequence_utility as sequence_utility
from assay.losses.utility_probability.utility_probability import utility_to_probability as utility_to_probability
from assay.optim.normalized_lr.normalized_lr import normalized_logistic as normalized_logistic
from assay.optim.perpgrad.perpgrad import softmax_collapse_fraction as softmax_collapse_fraction
