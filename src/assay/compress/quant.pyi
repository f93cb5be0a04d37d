# Made from the cards by 'make generate'.
from assay.optim.eightbit.eightbit import QuantizedState as QuantizedState
from assay.optim.eightbit.eightbit import dequantize_blockwise as dequantize_blockwise
from assay.optim.eightbit.eightbit import dynamic_map as dynamic_map
from assay.optim.eightbit.eightbit import quantize_blockwise as quantize_blockwise
