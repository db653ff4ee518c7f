"""How an image is resized and cropped to the model's square, as in open_clip's inference transforms."""

from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image, ImageOps

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_MODES = ("shortest", "squash", "longest")


@dataclass(frozen=True)
class Fit:
    """The model's square and the way to it.

    `shortest` resizes the shortest side to side_px and crops the centre, `squash` resizes both sides, `longest` resizes
    the longest side and adds a border. Raises ValueError for a mode or an interpolation that open_clip does not have.
    """

    side_px: int = 224
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"
    fill_color: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("resize_mode", self.resize_mode, _MODES),
            ("interpolation", self.interpolation, _FILTERS),
        ):
            if value not in known:
                raise ValueError(f"parameter {name} is {value}, not one of {', '.join(known)}")

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> "Fit":
        """The fit that the parameters of `config.pbtxt` describe; by default 224 px, shortest and bicubic."""
        return cls(
            int(parameters.get("side_px", 224)),
            parameters.get("resize_mode", "shortest"),
            parameters.get("interpolation", "bicubic"),
            int(parameters.get("fill_color", 0)),
        )

    @property
    def filter(self) -> Image.Resampling:
        """Pillow's name for the interpolation."""
        return _FILTERS[self.interpolation]

    @property
    def fits_kernel(self) -> bool:
        """Whether `clip_resample` can do it: bicubic, and a crop."""
        return self.interpolation == "bicubic" and self.resize_mode != "longest"

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) that an image of this size is resized to, before the crop or the border.

        The other side is rounded down with `shortest`, as in torchvision's Resize, and to nearest with `longest`.
        """
        side = self.side_px
        if self.resize_mode == "squash":
            return side, side
        if self.resize_mode == "longest":
            ratio = max(width / side, height / side)
            return round(width / ratio), round(height / ratio)
        return (side, int(side * height / width)) if width <= height else (int(side * width / height), side)

    def offset(self, length: int) -> int:
        """Where the centre crop begins. torchvision's CenterCrop rounds half to even; flooring is off by one pixel."""
        return round((length - self.side_px) / 2)

    def padded(self, image: Image.Image) -> Image.Image:
        """The image padded to the square, an odd pixel right and below, as by open_clip's CenterCropOrPad."""
        missing = [self.side_px - length for length in image.size]
        border = (missing[0] // 2, missing[1] // 2, (missing[0] + 1) // 2, (missing[1] + 1) // 2)
        bands = len(image.getbands())
        return ImageOps.expand(image, border, self.fill_color if bands == 1 else (self.fill_color,) * bands)


DEFAULT = Fit()
