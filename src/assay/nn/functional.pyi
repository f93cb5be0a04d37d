# Made from the cards by 'make generate'.
from assay.nn.batch_group_norm.batch_group_norm import batch_group_norm as batch_group_norm
