# Made from the cards by 'make generate'.
from assay.losses.ps_kd.ps_kd import PSKD as PSKD
from assay.losses.ps_kd.ps_kd import pskd_schedule as pskd_schedule
from assay.losses.ps_kd.ps_kd import soft_target_cross_entropy as soft_target_cross_entropy
