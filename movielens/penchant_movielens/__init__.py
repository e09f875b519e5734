"""MovieLens ml-latest-small, release of September 2018: `ratings.csv` and `movies.csv`, unchanged but for LF line ends.

GroupLens' terms, in full in GROUPLENS-README.txt beside this file, allow research and forbid commercial use, which is
why the data lives in a distribution of its own.

Source: https://grouplens.org/datasets/movielens/
"""

from pathlib import Path

TERMS = (
    "MovieLens, GroupLens Research, University of Minnesota: research use only, no commercial use without permission.\n"
    "Cite Harper and Konstan 2015, The MovieLens Datasets: History and Context, https://doi.org/10.1145/2827872."
)

SHA256 = {
    "ratings.csv": "80da8b3393dae325bbba5a31f291a6ba55d8d4f4396de3c456f2c1635b1b70e8",
    "movies.csv": "c47b783f23eb304413307e1bb05335e427737da20ec8d3c0e96335567dd5f3dc",
    "GROUPLENS-README.txt": "63d22ac138e80fae37021797ed8e1b9424b5239dc576a137422adf783ae3f404",
}


def path() -> Path:
    """The folder that holds the files."""
    return Path(__file__).parent
