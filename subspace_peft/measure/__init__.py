"""How many dimensions a task needs: success probability, threshold training dimension and intrinsic dimension.

They come from a table of runs, or from a search that makes the runs it needs.
"""

try:
    import pandas  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('subspace_peft.measure needs pandas; pip install "subspace-peft[measure]".') from error

from .dimension import Dimension, intrinsic_dimension, threshold_dimension
from .probability import success_probability
from .search import Cost, SearchResult, find_dimension
from .table import running_maximum
from .trials import RunError


Search = SearchResult  # for code that imports the result under this name

__all__ = [
    "Cost",
    "Dimension",
    "RunError",
    "Search",
    "SearchResult",
    "find_dimension",
    "intrinsic_dimension",
    "running_maximum",
    "success_probability",
    "threshold_dimension",
]
