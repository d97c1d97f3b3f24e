"""Drawn pictures with their questions and answers: shapes, digits and signs, as drawn or as a cheap camera sees them.

Drawn on the fly from a random source. Digits are scikit-learn's 8 x 8 handwriting (BSD-3, from UCI's optical digits), a
fifth of which is held out; held-out shapes and signs come from other seeds.
"""

from dataclasses import dataclass, replace
from functools import cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from export.nano import domain
from export.nano.split import read_split

SIZE = 112  # pixels of a square picture's side, a multiple of 28
CELL = 28  # pixels of one token
# Rows and columns of the cells that a picture becomes: square, 4:3, 16:9 and their upright forms.
GRIDS = {(4, 4): 0.5, (3, 4): 0.25, (4, 3): 0.1, (3, 5): 0.1, (5, 3): 0.05}
Color = tuple[int, int, int]
_COLORS = {
    "red": (205, 35, 35),
    "green": (40, 160, 60),
    "blue": (45, 80, 205),
    "yellow": (235, 210, 50),
    "white": (245, 245, 245),
    "purple": (140, 50, 165),
    "orange": (240, 135, 30),
}
_PURE = {
    "red": (255, 0, 0),
    "green": (0, 140, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "white": (255, 255, 255),
    "purple": (128, 0, 128),
    "orange": (255, 150, 0),
}
_CONTRAST = 110  # sum of the differences of red, green and blue from which a shape is seen
_GROUNDS = ((25, 25, 30), (90, 90, 95), (150, 140, 130), (60, 75, 70))
_CLEAR = 1.3  # how many times as large, or as far off, something has to be to be called the biggest, or on the left
KINDS: list[str] = ["nothing", *domain.SHAPES, "digit", "sign"]


@dataclass(frozen=True)
class Shape:
    """One drawn shape, in pixels."""

    kind: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Picture:
    """Pixels [height, width, 3] uint8, whole cells of CELL, and what is in them."""

    pixels: np.ndarray
    shapes: tuple[Shape, ...] = ()
    digit: int | None = None
    sign: str | None = None

    def cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Labels of each 28-pixel cell [rows, columns]: index into KINDS, 1 + index into domain.COLORS (0: none), and
        radius in tens of pixels, of the shape whose centre lies in it; a digit or sign fills all cells."""
        grid = self.pixels.shape[0] // CELL, self.pixels.shape[1] // CELL
        kind, color = np.zeros(grid, np.int64), np.zeros(grid, np.int64)
        size = np.zeros(grid, np.float32)
        if self.digit is not None or self.sign is not None:
            kind[:] = KINDS.index("sign" if self.digit is None else "digit")
        for shape in self.shapes:
            at = int(shape.y // CELL), int(shape.x // CELL)
            kind[at], color[at] = KINDS.index(shape.kind), 1 + domain.COLORS.index(shape.color)
            size[at] = shape.radius / 10
        return kind, color, size


@dataclass(frozen=True)
class Paper:
    """What a picture is drawn on: width and height in pixels, the ground's colour, and whether it is `drawn`, with pure
    colours and sharp edges as a painting program leaves them, or seen by a camera."""

    width: int
    height: int
    ground: Color
    drawn: bool

    @classmethod
    def draw(cls, rng: Random, cells: tuple[int, int]) -> "Paper":
        """A sheet of (rows, columns) of cells: white most often, dark as a room, or of any colour."""
        kind = rng.random()
        if kind < 0.35:
            ground = (255, 255, 255) if rng.random() < 0.6 else _jitter(rng, (240, 238, 230), 12)
        elif kind < 0.65:
            ground = _jitter(rng, rng.choice(_GROUNDS))
        elif kind < 0.85:
            ground = _jitter(rng, rng.choice(list(_COLORS.values())), 40)
        else:
            ground = rng.randrange(256), rng.randrange(256), rng.randrange(256)
        return cls(cells[1] * CELL, cells[0] * CELL, ground, rng.random() < 0.45)

    def shows(self, color: Color) -> bool:
        """Whether it stands out from the ground."""
        return _apart(self.ground, color) > _CONTRAST

    def ink(self, rng: Random, name: str) -> Color:
        """A colour of that name as it comes out here."""
        return _jitter(rng, rng.choice((_PURE[name], _COLORS[name])), 4) if self.drawn else _jitter(rng, _COLORS[name])

    def sheet(self) -> Image.Image:
        """The empty ground, `scale` times as large."""
        return Image.new("RGB", (self.width * self.scale, self.height * self.scale), self.ground)

    @property
    def scale(self) -> int:
        """Drawings are made larger and come down with smooth edges."""
        return 4 if self.drawn else 1


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # only needed where pictures of digits are drawn

    images, labels = load_digits(return_X_y=True)
    return images.reshape(-1, 8, 8), labels


def outline(shape: Shape, turn: float) -> list[tuple[float, float]]:
    """Corner points; a circle is drawn otherwise."""
    r = shape.radius
    if shape.kind == "cross":
        w = r * 0.35
        points = [
            (-w, -r),
            (w, -r),
            (w, -w),
            (r, -w),
            (r, w),
            (w, w),
            (w, r),
            (-w, r),
            (-w, w),
            (-r, w),
            (-r, -w),
            (-w, -w),
        ]
    elif shape.kind == "star":
        radii = [r if i % 2 == 0 else 0.42 * r for i in range(10)]
        points = [(q * np.sin(np.pi * i / 5), -q * np.cos(np.pi * i / 5)) for i, q in enumerate(radii)]
    else:
        n = {"square": 4, "triangle": 3}[shape.kind]
        shift = np.pi / 4 if n == 4 else 0
        points = [(r * np.sin(2 * np.pi * i / n + shift), -r * np.cos(2 * np.pi * i / n + shift)) for i in range(n)]
    c, s = np.cos(turn), np.sin(turn)
    return [(shape.x + c * x - s * y, shape.y + s * x + c * y) for x, y in points]


def _jitter(rng: Random, color: Color, amount: int = 18) -> Color:
    r, g, b = (min(255, max(0, c + rng.randint(-amount, amount))) for c in color)
    return r, g, b


def _draw_shapes(rng: Random, paper: Paper, image: Image.Image, shapes: list[Shape]) -> None:
    canvas, scale = ImageDraw.Draw(image), paper.scale
    edge = (0, 0, 0) if paper.drawn and rng.random() < 0.25 else None
    for shape in shapes:
        fill = paper.ink(rng, shape.color)
        turn = 0.0 if paper.drawn and rng.random() < 0.7 else rng.uniform(-0.3, 0.3)
        if shape.kind == "circle":
            box = (shape.x - shape.radius, shape.y - shape.radius, shape.x + shape.radius, shape.y + shape.radius)
            canvas.ellipse([scale * v for v in box], fill=fill, outline=edge, width=scale)
        else:
            points = [(scale * x, scale * y) for x, y in outline(shape, turn)]
            canvas.polygon(points, fill=fill, outline=edge, width=scale)


def _place_shapes(rng: Random, paper: Paper, count: int) -> list[Shape]:
    """Shapes whose centres lie in different cells and which do not overlap much, in colours that the ground shows."""
    shapes: list[Shape] = []
    colors = [name for name in domain.COLORS if paper.shows(_COLORS[name]) and paper.shows(_PURE[name])]
    low, high = (18, 36) if count == 1 else (10, 22) if count <= 3 else (9, 14)
    for _ in range(200):
        if len(shapes) == count:
            break
        r = rng.uniform(low, high)
        x, y = rng.uniform(r, paper.width - r), rng.uniform(r, paper.height - r)
        new = Shape(rng.choice(domain.SHAPES), rng.choice(colors), x, y, r)
        if all(np.hypot(new.x - s.x, new.y - s.y) > 0.9 * (r + s.radius) + 2 for s in shapes):
            cells = {(int(s.x // CELL), int(s.y // CELL)) for s in shapes}
            if (int(new.x // CELL), int(new.y // CELL)) not in cells:
                shapes.append(new)
    return shapes


def _look_at(rng: Random, paper: Paper, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """The pixels [height, width, 3], and the matrix [3, 3] that moves a point of the paper to where it is seen."""
    if paper.drawn:
        return np.asarray(image.resize((paper.width, paper.height), Image.Resampling.BICUBIC)), np.eye(3)
    return _camera(rng, image)


def _camera(rng: Random, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Perspective, blur, exposure, noise; the pixels, and the matrix [3, 3] that moves a point with the perspective."""
    moved = np.eye(3)
    if rng.random() < 0.5:
        tilt = [rng.uniform(-0.0004, 0.0004) for _ in range(2)]
        shear = [rng.uniform(-0.06, 0.06) for _ in range(2)]
        origins = (1, shear[0], -shear[0] * image.height / 2, shear[1], 1, -shear[1] * image.width / 2, *tilt)
        image = image.transform(image.size, Image.Transform.PERSPECTIVE, origins, Image.Resampling.BILINEAR)
        moved = np.linalg.inv(np.reshape((*origins, 1), (3, 3)))  # `origins` says where each pixel comes from
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.0)))
    pixels = np.asarray(image, np.float32) * rng.uniform(0.75, 1.15) + rng.uniform(-15, 15)
    noise = np.random.default_rng(rng.getrandbits(63)).standard_normal(pixels.shape, np.float32)
    return np.clip(pixels + noise * np.float32(rng.uniform(0, 10)), 0, 255).astype(np.uint8), moved


def _moved(shape: Shape, matrix: np.ndarray, paper: Paper) -> Shape:
    """The shape where its centre is seen, inside the picture."""
    x, y, w = matrix @ (shape.x, shape.y, 1)
    return replace(shape, x=min(max(x / w, 0.0), paper.width - 1.0), y=min(max(y / w, 0.0), paper.height - 1.0))


def draw_shapes(rng: Random, count: int, cells: tuple[int, int] = (4, 4)) -> Picture:
    """A picture of up to `count` shapes."""
    paper = Paper.draw(rng, cells)
    image, shapes = paper.sheet(), _place_shapes(rng, paper, count)
    _draw_shapes(rng, paper, image, shapes)
    pixels, moved = _look_at(rng, paper, image)
    return Picture(pixels, tuple(_moved(shape, moved, paper) for shape in shapes))


def draw_digit(rng: Random, heldout: bool, cells: tuple[int, int] = (4, 4)) -> Picture:
    """One handwritten digit, large."""
    modulus, residue = read_split().heldout_digit
    images, labels = _digits()
    chosen = [i for i in range(len(images)) if (i % modulus == residue) == heldout]
    index = rng.choice(chosen)
    paper = Paper.draw(rng, cells)
    side = paper.scale * rng.randint(58, min(100, paper.width, paper.height))
    glyph = Image.fromarray((images[index] * 15.9).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    image = paper.sheet()
    inks = (250, 250, 250), (235, 210, 50), (240, 150, 60), (15, 15, 20), (20, 20, 160), (190, 20, 20)
    seen = [color for color in inks if _apart(color, paper.ground) > 2 * _CONTRAST] or [_opposite(paper.ground)]
    ink = Image.new("RGB", glyph.size, _jitter(rng, rng.choice(seen)))
    image.paste(ink, (rng.randint(0, image.width - side), rng.randint(0, image.height - side)), glyph)
    return Picture(_look_at(rng, paper, image)[0], digit=int(labels[index]))


def _apart(one: Color, other: Color) -> int:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def _opposite(color: Color) -> Color:
    return (10, 10, 10) if sum(color) > 380 else (250, 250, 250)


def draw_sign(rng: Random, cells: tuple[int, int] = (4, 4)) -> Picture:
    """One word of domain.SIGNS in capitals, on a plate or on the bare ground."""
    paper, word = Paper.draw(rng, cells), rng.choice(domain.SIGNS)
    image, scale = paper.sheet(), paper.scale
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(scale * rng.randint(20, 30 if paper.width < 112 else 34))
    left, top, right, bottom = draw.textbbox((0, 0), word.upper(), font=font)
    x, y = (
        rng.uniform(2, max(3.0, whole - size - 4 * scale))
        for whole, size in ((image.width, right - left), (image.height, bottom - top))
    )
    plate = paper.ground
    if rng.random() < 0.7:
        plate = _jitter(rng, rng.choice(((200, 40, 40), (240, 240, 235), (40, 80, 170), (235, 200, 60))))
        edge = 6 * scale
        draw.rectangle((x - edge, y - edge, x + right - left + edge, y + bottom - top + edge), fill=plate)
    ink = (15, 15, 20) if sum(plate) > (450 if plate is not paper.ground else 380) else (250, 250, 250)
    draw.text((x - left, y - top), word.upper(), font=font, fill=ink)
    return Picture(_look_at(rng, paper, image)[0], sign=word)


def draw_grid(rng: Random) -> tuple[int, int]:
    """Rows and columns of a picture, as often as people's pictures have them."""
    return rng.choices(list(GRIDS), list(GRIDS.values()))[0]


def draw_picture(rng: Random, heldout: bool = False, cells: tuple[int, int] = (4, 4)) -> Picture:
    """A picture of any kind; half show one object."""
    kind = rng.random()
    if kind < 0.2:
        return draw_digit(rng, heldout, cells)
    if kind < 0.3:
        return draw_sign(rng, cells)
    return draw_shapes(rng, 1 if kind < 0.55 else rng.randint(2, 5), cells)


def _plural(kind: str) -> str:
    return kind + ("es" if kind == "cross" else "s")


def _count(n: int, one: str, many: str) -> str:
    return f"there is one {one}" if n == 1 else f"there are {domain.number(n) if n else 'no'} {many}"


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' and not words.startswith('one') else 'a'} {words}"


def _side(shape: Shape, width: int, height: int) -> str | None:
    """Where it clearly is; None between two places."""
    dx, dy = (shape.x - width / 2) / width, (shape.y - height / 2) / height
    near, far = sorted((abs(dx), abs(dy)))
    if far < 1 / 10:
        return "in the middle"
    if far < 1 / 6 or far < _CLEAR * near:
        return None
    if abs(dx) == far:
        return "on the left" if dx < 0 else "on the right"
    return "on the top" if dy < 0 else "on the bottom"


def questions(picture: Picture) -> list[tuple[str, str]]:
    """Every question about the picture that has one right answer, with that answer; the questions are the domain's."""
    if picture.digit is not None:
        seen = f"it is {_a(domain.number(picture.digit))}"
        return [("what digit is this", seen), ("which number is this", seen)]
    if picture.sign is not None:
        return [("what does it say", f"it says {picture.sign}"), ("what word is this", f"it says {picture.sign}")]
    shapes, found = picture.shapes, []
    counted = _count(len(shapes), "shape", "shapes")
    found += [("how many shapes are there", counted), ("how many shapes do you see", counted)]
    if len(shapes) == 1:
        seen = f"it is {_a(f'{shapes[0].color} {shapes[0].kind}')}"
        found += [("what shape is this", seen), ("what do you see", seen)]
    height, width = picture.pixels.shape[:2]
    found += _by_kind(shapes, width, height) + _by_color(shapes)
    return found + _by_size(shapes)


def _by_kind(shapes: tuple[Shape, ...], width: int, height: int) -> list[tuple[str, str]]:
    found = []
    for kind in domain.SHAPES:
        those = [s for s in shapes if s.kind == kind]
        found.append((f"how many {_plural(kind)} are there", _count(len(those), kind, _plural(kind))))
        if len(those) == 1:
            found.append((f"what color is the {kind}", f"the {kind} is {those[0].color}"))
            if side := _side(those[0], width, height):
                found.append((f"where is the {kind}", f"the {kind} is {side}"))
    return found


def _by_color(shapes: tuple[Shape, ...]) -> list[tuple[str, str]]:
    found = []
    for color in domain.COLORS:
        those = [s for s in shapes if s.color == color]
        found.append((f"how many {color} shapes are there", _count(len(those), f"{color} shape", f"{color} shapes")))
        if len(those) == 1:
            found.append((f"which shape is {color}", f"the {those[0].kind} is {color}"))
    return found


def _by_size(shapes: tuple[Shape, ...]) -> list[tuple[str, str]]:
    if len(shapes) < 2:
        return []
    order = sorted(shapes, key=lambda s: s.radius)
    found = []
    if order[-1].radius > _CLEAR * order[-2].radius:
        found.append(("which shape is the biggest", f"the {order[-1].kind} is the biggest"))
    if order[0].radius < order[1].radius / _CLEAR:
        found.append(("which shape is the smallest", f"the {order[0].kind} is the smallest"))
    return found


def draw_question(rng: Random, pairs: list[tuple[str, str]]) -> tuple[str, str]:
    """One of the questions with its answer; what is not there is asked for less often than what is."""
    weights = [0.2 if answer.startswith("there are no ") else 1.0 for _, answer in pairs]
    return rng.choices(pairs, weights)[0]


def draw_questions(rng: Random, pairs: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """Up to `count` different ones, each form of question as often as the others, whatever its words name."""
    left: dict[str, list[tuple[str, str]]] = {}
    for pair in pairs:
        left.setdefault(_form(pair[0]), []).append(pair)
    drawn: list[tuple[str, str]] = []
    while left and len(drawn) < count:
        form = rng.choice(list(left))
        drawn.append(draw_question(rng, left[form]))
        left[form].remove(drawn[-1])
        if not left[form]:
            del left[form]
    return drawn


def _form(question: str) -> str:
    """The question with COLOR and KIND for the words that name them."""
    names: dict[str, str] = dict.fromkeys(domain.COLORS, "COLOR")
    names |= {form: "KIND" for kind in domain.SHAPES for form in (kind, _plural(kind))}
    return " ".join(names.get(word, word) for word in question.split())


def patches(pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Pixels [height, width, 3] -> patches [4 cells, 1176] in merge-block order, the two time slices alike."""
    x = ((pixels / 255.0 - np.array(mean)) / np.array(std)).astype(np.float32)
    rows, columns = x.shape[0] // CELL, x.shape[1] // CELL
    x = x.reshape(rows, 2, 14, columns, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)  # block, sub-block, channel, y, x
    return np.repeat(x.reshape(-1, 3, 1, 14, 14), 2, axis=2).reshape(rows * columns * 4, -1)
