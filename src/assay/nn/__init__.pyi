# Made from the cards by 'make generate'.
from assay.losses.cfcd.cfcd import GlobalDescriptor as GlobalDescriptor
from assay.losses.cfcd.cfcd import multi_scale_descriptors as multi_scale_descriptors
from assay.nn._projection import ProjectionHead as ProjectionHead
from assay.nn._swap import NoEffectWarning as NoEffectWarning
from assay.nn._swap import swap as swap
from assay.nn.batch_group_norm.batch_group_norm import BatchGroupNorm1d as BatchGroupNorm1d
from assay.nn.batch_group_norm.batch_group_norm import BatchGroupNorm2d as BatchGroupNorm2d
from assay.nn.batch_group_norm.batch_group_norm import BatchGroupNorm3d as BatchGroupNorm3d
from assay.nn.batch_group_norm.batch_group_norm import convert_batchnorm_ as convert_batchnorm_
from assay.nn.batch_group_norm.batch_group_norm import suggest_groups as suggest_groups
from assay.nn.stablemax.stablemax import LogStableMax as LogStableMax
from assay.nn.stablemax.stablemax import StableMax as StableMax
from assay.optim.eightbit.eightbit import StableEmbedding as StableEmbedding
from assay.optim.gradnormlorp.gradnormlorp import GradNormLoRPLinear as GradNormLoRPLinear
from assay.optim.ssam_structured.ssam_structured import ImplicitSparseConv2d as ImplicitSparseConv2d
from assay.optim.ssam_structured.ssam_structured import ImplicitSparseLinear as ImplicitSparseLinear
from assay.optim.ssam_structured.ssam_structured import to_implicit_sparse as to_implicit_sparse
