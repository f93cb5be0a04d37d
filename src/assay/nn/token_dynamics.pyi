# Made from the cards by 'make generate'.
from assay.nn.mamba_tokens.mamba_tokens import classify as classify
from assay.nn.mamba_tokens.mamba_tokens import input_output_spectrum as input_output_spectrum
from assay.nn.mamba_tokens.mamba_tokens import simulate as simulate
