# Made from the cards by 'make generate'.
from assay.nn.topk_moe.topk_moe import TopKGaussianMoE as TopKGaussianMoE
from assay.nn.topk_moe.topk_moe import fit_em as fit_em
from assay.nn.topk_moe.topk_moe import min_selected_experts as min_selected_experts
from assay.nn.topk_moe.topk_moe import voronoi_cells as voronoi_cells
from assay.nn.topk_moe.topk_moe import voronoi_loss as voronoi_loss
