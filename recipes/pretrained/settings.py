"""What a run of this recipe is: a flat record of settings."""

from dataclasses import dataclass, fields

from recipes.lab.settings import Named, unnamed
from recipes.pretrained.answers import QUESTIONS
from recipes.tasks.data import COARSE_CLASSES, HUB
from subspace_peft.coordinates import COORDINATES
from subspace_peft.projections import PROJECTIONS


METHODS = {
    "full": "full fine-tuning",
    "head": "head alone",
    "bitfit": "BitFit",
    "lora": "LoRA",
    "lokr": "LoKr",
    "vera": "VeRA",
    "fourierft": "FourierFT",
    "waveft": "WaveFT",
    "vblora": "VB-LoRA",
    "unilora": "Uni-LoRA",
    "tinylora": "TinyLoRA",
    "none": "not trained",
    "subspace": "subspace",
}
"""Method -> its name in words; `subspace` is ours."""
WORDS = {"basis": "basis of the other tasks", "identity": "all of them"}
"""Projections whose names say too little."""
FOUND = ", rates found"
WITHOUT_ADAPTER = ("full", "head", "bitfit", "none")
"""Baselines, which settings of adapters say nothing of."""
BY_D = ("subspace", "unilora", "tinylora", "fourierft", "waveft", "vblora")
"""Methods whose size is the number of their parameters, `d`: exactly, or the next that they can have below it."""
BY_RANK = ("lora", "lokr", "vera", "unilora")
IMAGES = ("digits", *HUB)
POOLING = ("mean", "first", "answer")
PARAMETERS = {"weight": "", "vectors": "norms and biases"}
"""What ours moves in the adapted modules: as LoRA their weights, or as BitFit what has one dimension; in words."""
CHOICES = {"method": METHODS, "pooling": POOLING, "coordinates": COORDINATES, "projection": PROJECTIONS}
CHOICES |= {"parameters": PARAMETERS}
LEAST = dict.fromkeys(("epochs", "batch_size", "length"), 1)
LEAST |= {"task": -1} | dict.fromkeys(("source_examples", "source_epochs"), 0)
LEAST |= dict.fromkeys(("lr", "head_lr", "warmup", "examples", "image_size", "measured_examples"), 0)


@dataclass(frozen=True)
class Settings(Named):
    """One training."""

    dataset: str = "sst2"
    base: str = "sentence-transformers/all-MiniLM-L6-v2"
    pooling: str = "mean"  # of all token vectors; or first: that of the first token, by the encoder's own pooler; or
    # answer: no vector and no head, but the word with which a language model goes on
    length: int = 48  # tokens of a sentence; what is longer is cut
    method: str = "full"
    coordinates: str = "weight"
    projection: str = "fastjl"
    parameters: str = "weight"  # or vectors: those of one dimension, in all modules but the head
    d: int = 0
    rank: int = 0  # of LoRA, VeRA, Uni-LoRA and low_rank coordinates
    modules: str = ""  # a regular expression, found in the names of the linear modules to adapt; "": all but the head
    seed: int = 0  # of the new head, of P and what other methods draw, and of the order of the batches
    epochs: int = 2
    batch_size: int = 32  # of all processes together
    lr: float = 1e-3  # 0: that and the head's are found, by SubspaceTrainer
    head_lr: float = 1e-3  # of the head, whatever is trained beside it
    warmup: float = 0.06  # of all steps; the rate then falls as a cosine to zero
    image_size: int = 0  # pixels of a side, to which images are resized; 0: as they are
    measured_examples: int = 0  # the first of the test set, and of the sentences that validate; 0: all
    examples: int = 2000  # of the training set, the same for every seed; 0: all
    task: int = -1  # one of the tasks that the coarse labels of a data set make; -1: the data set itself
    source_examples: int = 0  # of each of the other tasks, whose adapters give a `basis`; 0: all
    source_epochs: int = 0  # on each of them
    data: str = unnamed("")  # a folder of parquet files, or another Hub id, in place of the data set's
    weights: str = unnamed("")  # a folder, or another Hub id, that holds the weights of `base`
    save_adapter: bool = unnamed(False)

    def __post_init__(self):
        self._check(CHOICES, LEAST)
        if self.method != "subspace":
            self._reset("coordinates", "projection", "parameters")
        ranked = self.method in BY_RANK or (self.method == "subspace" and self.coordinates == "low_rank")
        sized = self.method in BY_D and self.projection != "identity"
        for key, wanted in (("d", sized), ("rank", ranked)):
            if not wanted:
                self._reset(key)
            elif getattr(self, key) < 1:
                raise ValueError(
                    f"`{key}` must be at least 1 for {self.label}, got {getattr(self, key)}; give `{key}`."
                )
        if self.projection != "basis":
            self._reset("source_examples", "source_epochs")
        elif self.task < 0 or self.parameters != "vectors" or self.source_epochs < 1:
            raise ValueError(
                "`basis` must come from other tasks: it needs a `task`, parameters: vectors and `source_epochs` of at "
                f"least 1, got {self.task}, {self.parameters} and {self.source_epochs}."
            )
        count = COARSE_CLASSES.get(self.dataset, 0)
        if self.task >= count:
            known = f"from 0 to {count - 1}" if count else f"of {' or '.join(COARSE_CLASSES)}"
            raise ValueError(f"`task` must be {known} for {self.dataset!r}, got {self.task}; -1 is no task.")
        if self.projection == "basis" and self.d >= count:
            raise ValueError(f"`d` must be at most {count - 1}, the number of other tasks, got {self.d}; lower it.")
        if self.parameters == "vectors" and self.coordinates != "weight":
            raise ValueError(f"`parameters` 'vectors' need `coordinates` 'weight', got {self.coordinates!r}.")
        if self.method in ("head", "none"):
            self._reset("lr")
        if self.pooling == "answer":
            if self.method == "head":
                raise ValueError("`method` must not be 'head' for `pooling` 'answer', which has no head; take 'none'.")
            if self.dataset not in QUESTIONS:
                raise ValueError(
                    f"`dataset` must be one of {', '.join(QUESTIONS)} for `pooling` 'answer', got {self.dataset!r}."
                )
            self._reset("head_lr")
        if self.rates_are_found:
            if self.method != "subspace":
                raise ValueError(
                    f"`lr` must be above 0 for {self.label}, got {self.lr}; rates are found for ours alone."
                )
            self._reset("head_lr")
        if self.method in WITHOUT_ADAPTER or self.parameters == "vectors":
            self._reset("modules")

    @property
    def model(self) -> str:
        """The base, without its owner."""
        return self.base.rpartition("/")[2]

    @property
    def has_images(self) -> bool:
        return self.dataset in IMAGES

    @property
    def rates_are_found(self) -> bool:
        return self.lr == 0

    @property
    def label(self) -> str:
        """The method in words, without its size."""
        if self.method == "subspace":
            words = PARAMETERS[self.parameters] or self.coordinates.replace("_", " ")
            return f"{words}, {WORDS.get(self.projection, self.projection)}" + FOUND * self.rates_are_found
        return METHODS[self.method]

    def __str__(self) -> str:
        size = (f" d={self.d}" if self.d else "") + (f" rank={self.rank}" if self.rank else "")
        size += f" in {self.modules}" * bool(self.modules) + f" task {self.task}" * (self.task >= 0)
        return f"{self.label}{size} lr={self.head_lr if self.method == 'head' else self.lr:g} seed={self.seed}"


KEYS = [f.name for f in fields(Settings)]


settings = Settings.of  # from one point of the grid
