"""Multiple ranks: MPI starts and numbers them, `torch.distributed` or TensorRT's NCCL moves the tensors.

mpirun -n 2 python script.py       # the same script on every rank; `join` forms a team
with parallel.cluster(2) as ranks: # the same from a notebook, over ipyparallel
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
