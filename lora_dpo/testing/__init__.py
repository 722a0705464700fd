"""The contract of objectives, for a user to run on one of her own.

``check_objective("my_loss")`` asks of it all that is asked of every row of the table, and names each
property that does not hold. ``CONTRACT`` has the checks one by one, for a parametrised test.
"""

from lora_dpo.testing.contract import CONTRACT, check_objective
from lora_dpo.testing.records import make_stats, random_stats

__all__ = ["CONTRACT", "check_objective", "make_stats", "random_stats"]
