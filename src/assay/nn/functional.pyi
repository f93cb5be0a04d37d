# Made from the cards by 'make generate'.
from assay.nn.batch_group_norm.batch_group_norm import batch_group_norm as batch_group_norm
from assay.nn.nalaformer.nalaformer import attention_entropy as attention_entropy
from assay.nn.nalaformer.nalaformer import key_feature_map as key_feature_map
from assay.nn.nalaformer.nalaformer import norm_aware_feature_map as norm_aware_feature_map
from assay.nn.nalaformer.nalaformer import norm_aware_linear_attention as norm_aware_linear_attention
from assay.nn.stablemax.stablemax import log_stablemax as log_stablemax
from assay.nn.stablemax.stablemax import stablemax as stablemax
from assay.nn.tract.tract import precondition_first_layer_grad_ as precondition_first_layer_grad_
from assay.nn.tract.tract import tract_linear as tract_linear
