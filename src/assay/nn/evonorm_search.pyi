# Made from the cards by 'make generate'.
from assay.nn.evonorm.evonorm import Anchor as Anchor
from assay.nn.evonorm.evonorm import Candidate as Candidate
from assay.nn.evonorm.evonorm import GraphLayer as GraphLayer
from assay.nn.evonorm.evonorm import LayerGraph as LayerGraph
from assay.nn.evonorm.evonorm import mutate as mutate
from assay.nn.evonorm.evonorm import quality_reject as quality_reject
from assay.nn.evonorm.evonorm import random_graph as random_graph
from assay.nn.evonorm.evonorm import rerank as rerank
from assay.nn.evonorm.evonorm import search as search
from assay.nn.evonorm.evonorm import stability_reject as stability_reject
