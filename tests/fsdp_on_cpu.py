"""`python -m dpo_helpers`, with its CPU processes called GPUs: accelerate shards a model (FSDP) on accelerators alone."""

import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

if __name__ == "__main__":
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU

    from dpo_helpers.__main__ import main

    sys.exit(main())
