# Made from the cards by 'make generate'.
from assay.losses.mw_loss.mw_loss import aoc as aoc
from assay.losses.mw_loss.mw_loss import global_auc as global_auc
from assay.metrics._retrieval import mean_average_precision as mean_average_precision
from assay.metrics._retrieval import mean_reciprocal_rank as mean_reciprocal_rank
from assay.metrics._retrieval import ndcg as ndcg
from assay.metrics._retrieval import nmi as nmi
from assay.metrics._retrieval import precision_at_k as precision_at_k
from assay.metrics._retrieval import recall_at_k as recall_at_k
from assay.metrics._retrieval import same_label_pairs as same_label_pairs
