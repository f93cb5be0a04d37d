# Made from the cards by 'make generate'.
from assay.optim.normalized_lr.normalized_lr import NormalizedLogisticClassifier as NormalizedLogisticClassifier
