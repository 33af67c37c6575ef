"""`python -m dpo_helpers`, with its CPU processes called GPUs: accelerate shards a model (FSDP) on
accelerators alone.
"""

import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

begin = PartialState.__init__


def begin_as_a_gpu(self, *args, **kwargs):
    is_first = not PartialState._shared_state
    begin(self, *args, **kwargs)
    if is_first:  # later ones may say FSDP
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = begin_as_a_gpu

    from dpo_helpers.__main__ import main

    sys.exit(main())
