# Made from the cards by 'make generate'.
from assay.nn.batch_group_norm.batch_group_norm import batch_group_norm as batch_group_norm
from assay.nn.stablemax.stablemax import log_stablemax as log_stablemax
from assay.nn.stablemax.stablemax import stablemax as stablemax
from assay.nn.tract.tract import precondition_first_layer_grad_ as precondition_first_layer_grad_
from assay.nn.tract.tract import tract_linear as tract_linear
