"""What a run of this recipe is: a flat record of settings."""

from dataclasses import dataclass, fields

from recipes.lab.settings import Named, unnamed
from subspace_peft.coordinates import COORDINATES
from subspace_peft.projections import PROJECTIONS


METHODS = ("full", "head", "lora", "adalora", "subspace")
CHOICES = {"method": METHODS, "coordinates": COORDINATES, "projection": PROJECTIONS}
LEAST = dict.fromkeys(("epochs", "batch_size"), 1)
LEAST |= dict.fromkeys(("lr", "head_lr", "warmup", "image_size", "images", "validation"), 0)
SHAPE = ("patch_size", "hidden_size", "layers", "heads")


@dataclass(frozen=True)
class Settings(Named):
    """One training."""

    dataset: str = "mnist"
    base: str = ""  # a Hub id, or the `checkpoint` of another run; "": no pretrained weights, a ViT of this shape:
    patch_size: int = 7
    hidden_size: int = 64  # the MLP is four times as wide
    layers: int = 4
    heads: int = 4
    image_size: int = 0  # pixels that images are resized to; 0: as they are
    method: str = "full"  # full, head (the new classifier alone), lora, adalora, subspace (ours)
    coordinates: str = "weight"
    projection: str = "fastfood"
    d: int = 0
    rank: int = 0  # of lora and of low_rank coordinates; of adalora the mean rank that is left at the end
    seed: int = 0  # of the new classifier, of P or of LoRA's factors, and of the order of the batches
    epochs: int = 2
    batch_size: int = 64  # of all processes together
    lr: float = 1e-3
    head_lr: float = 1e-3  # of the classifier, whatever is trained beside it
    warmup: float = 0.05  # of all steps; the rate then falls as a cosine to zero
    augment: bool = False  # flips and crops
    images: int = 0  # of the training set: the first so many; 0: all
    validation: int = 0  # accuracy is of the last so many training images; 0: of the test set
    bf16: bool = False
    checkpoint: str = unnamed("")  # the trained model is kept under this name in checkpoints/
    data: str = unnamed("")  # a folder of parquet files, or another Hub id
    save_adapter: bool = unnamed(False)

    def __post_init__(self):
        self._check(CHOICES, LEAST)
        if self.method != "subspace":
            self._reset("coordinates", "projection", "d")
        elif self.projection == "identity":
            self._reset("d")
        elif self.d < 1:
            raise ValueError(f"`d` must be at least 1 for projection {self.projection!r}, got {self.d}; give `d`.")
        if self.method in ("full", "head") or (self.method == "subspace" and self.coordinates == "weight"):
            self._reset("rank")
        elif self.rank < 1:
            raise ValueError(f"`rank` must be at least 1 for {self.label}, got {self.rank}; give `rank`.")
        if self.method == "head":
            self._reset("lr")
        if self.base:
            self._reset(*SHAPE)
        if self.checkpoint and self.method != "full":
            raise ValueError(f"`checkpoint` keeps a whole model: give `method` 'full', got {self.method!r}.")

    @property
    def label(self) -> str:
        """The method in words, without d and rank."""
        if self.method == "subspace":
            return f"{'low rank' if self.coordinates == 'low_rank' else self.coordinates}, {self.projection}"
        return {"full": "full fine-tuning", "head": "head alone", "lora": "LoRA", "adalora": "AdaLoRA"}[self.method]

    def __str__(self) -> str:
        size = (f" d={self.d}" if self.d else "") + (f" rank={self.rank}" if self.rank else "")
        return f"{self.label}{size} lr={self.head_lr if self.method == 'head' else self.lr:g} seed={self.seed}"


KEYS = [f.name for f in fields(Settings)]


settings = Settings.of  # from one point of the grid
