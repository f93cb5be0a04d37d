# Made from the cards by 'make generate'.
from assay.nn.self_expanding_cnn.self_expanding_cnn import Expander as Expander
from assay.nn.self_expanding_cnn.self_expanding_cnn import SelfExpandingCNN as SelfExpandingCNN
from assay.nn.self_expanding_cnn.self_expanding_cnn import insert_identity_conv as insert_identity_conv
from assay.nn.self_expanding_cnn.self_expanding_cnn import natural_expansion_score as natural_expansion_score
from assay.nn.self_expanding_cnn.self_expanding_cnn import widen_conv as widen_conv
