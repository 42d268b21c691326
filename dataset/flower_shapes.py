"""Draws five kinds of flowers and their surroundings as Pillow polygons."""

import numpy as np
from PIL import ImageDraw

CLASSES = ('daisy', 'dandelion', 'roses', 'sunflowers', 'tulips')

# Shared by all classes, so that the colour does not give the class away.
PETAL_COLORS = np.array([
    [240, 238, 230], [245, 232, 190], [245, 205, 40], [240, 150, 30], [205, 40, 35],
    [235, 140, 165], [200, 40, 115], [140, 80, 170], [225, 110, 90]])
LEAF_COLORS = np.array([[70, 110, 45], [95, 130, 60], [50, 85, 50], [110, 125, 70]])
DISC_COLORS = np.array([[225, 170, 30], [190, 130, 40], [95, 60, 30], [60, 45, 35], [140, 140, 50]])
GOLDEN_ANGLE = np.pi * (3 - 5**0.5)


class Pen:
  """Draws polygons in the coordinates of a flower: unit radius, y axis upwards."""

  def __init__(self, image, center, radius, rotation=0.0, tilt=1.0):
    """Initializes the pen.

    Args:
      image: RGB PIL image to draw on.
      center: (x, y) in pixels.
      radius: length of one unit in pixels.
      rotation: radians, anticlockwise.
      tilt: float in (0, 1], foreshortening of the y axis before the rotation.
    """
    self._draw = ImageDraw.Draw(image, 'RGBA')
    self._center = np.asarray(center, float)
    self._radius = radius
    cosine, sine = np.cos(rotation), np.sin(rotation)
    self._matrix = radius * np.array([[cosine, -sine * tilt], [-sine, -cosine * tilt]])

  def polygon(self, points, color, alpha=255):
    """Fills the polygon through points [n, 2] with an RGB colour."""
    pixels = np.asarray(points) @ self._matrix.T + self._center
    self._draw.polygon([tuple(p) for p in pixels], fill=(*_rgb(color), alpha))

  def line(self, points, color, width, alpha=255):
    """Draws a line through points [n, 2], `width` units wide."""
    pixels = np.asarray(points) @ self._matrix.T + self._center
    self._draw.line([tuple(p) for p in pixels], fill=(*_rgb(color), alpha),
                    width=max(1, round(width * self._radius)), joint='curve')

  def disc(self, center, radius, color, alpha=255):
    """Fills a circle."""
    turn = np.linspace(0, 2 * np.pi, 24)
    self.polygon(np.asarray(center) + radius * np.stack([np.cos(turn), np.sin(turn)], 1),
                 color, alpha)


def draw_flower(image, label, center, radius, random):
  """Draws one flower with its stem and leaves.

  Args:
    image: RGB PIL image to draw on.
    label: int, index into CLASSES.
    center: (x, y) of the flower head in pixels.
    radius: radius of the flower head in pixels.
    random: numpy Generator.
  """
  color = PETAL_COLORS[random.integers(len(PETAL_COLORS))] + random.normal(0, 12, 3)
  upright = random.normal(0, 0.35)
  stand = Pen(image, center, radius, upright)
  if CLASSES[label] == 'tulips':
    _draw_stem(stand, random, 'blade', width=0.09, bottom=-0.55)
    _draw_tulip(stand, color, random)
    return
  leaf, width, draw = {
      'daisy': ('narrow', 0.06, _draw_daisy),
      'dandelion': ('jagged', 0.07, _draw_dandelion),
      'roses': ('broad', 0.07, _draw_rose),
      'sunflowers': ('heart', 0.12, _draw_sunflower),
  }[CLASSES[label]]
  _draw_stem(stand, random, leaf, width, bottom=0.0)
  head = Pen(image, center, radius, random.uniform(0, 2 * np.pi), random.uniform(0.62, 1.0))
  draw(head, color, random)


def draw_blobs(image, random, count):
  """Draws translucent discs in leaf and petal colours, like objects out of focus."""
  colors = np.concatenate([LEAF_COLORS, LEAF_COLORS, PETAL_COLORS])
  for _ in range(count):
    center = random.uniform(0, 1, 2) * np.array(image.size)
    pen = Pen(image, center, random.uniform(8, 60), tilt=random.uniform(0.5, 1))
    pen.disc([0, 0], 1.0, colors[random.integers(len(colors))] * random.uniform(0.5, 1.1),
             alpha=int(random.uniform(60, 200)))


def draw_grass(image, random):
  """Draws blades of grass along the bottom edge."""
  width, height = image.size
  for x in random.uniform(0, width, 90):
    pen = Pen(image, (x, height), height * random.uniform(0.1, 0.45), random.normal(0, 0.25))
    pen.polygon(petal(1.0, 0.04, 1.0), _leaf_color(random))


def petal(length, width, pointedness, start=0.0, square=False):
  """Returns the outline [n, 2] of a petal along the y axis.

  Args:
    length, width: in units.
    pointedness: 0.3 is blunt, 1.0 is pointed.
    start: distance of the base from the origin.
    square: whether the tip is blunt and toothed like a dandelion floret.
  """
  t = np.linspace(0, 1, 15)
  profile = t**0.6 * (1 - t)**pointedness
  profile = width / 2 * profile / profile.max()
  if square:
    profile = width / 2 * np.minimum(1, t * 3 + 0.3)
    t = t - 0.06 * (np.arange(15) == 14)
  y = start + t * length
  return np.concatenate([np.stack([-profile, y], 1), np.stack([profile, y], 1)[::-1]])


def turned(points, angle):
  """Returns points [n, 2] rotated anticlockwise by `angle` radians."""
  cosine, sine = np.cos(angle), np.sin(angle)
  return points @ np.array([[cosine, sine], [-sine, cosine]])


def _shaded_petal(pen, color, random, angle, length, width, pointedness, start):
  """Draws a petal with a dark edge, a gradient from base to tip, and veins."""
  color = color * random.uniform(0.88, 1.08)
  pen.polygon(turned(petal(length * 1.02, width * 1.14, pointedness, start), angle), color * 0.55)
  pen.polygon(turned(petal(length, width, pointedness, start), angle), color * 0.82)
  for k, shade in ((0.85, 0.92), (0.66, 1.0), (0.42, 1.07)):
    inner = petal(length * k, width * k, pointedness, start + length * (1 - k) * 0.85)
    pen.polygon(turned(inner, angle), color * shade)
  for side in (-0.14, 0.0, 0.14):
    vein = np.array([[side * width * 0.6, start + 0.1 * length],
                     [side * width * 1.6, start + 0.8 * length]])
    pen.line(turned(vein, angle), color * 0.72, 0.008, alpha=150)


def _ring(pen, color, random, count, length, width, pointedness, start, phase=0.0):
  for i in range(count):
    angle = phase + 2 * np.pi * i / count + random.normal(0, 0.15 / count * 2 * np.pi)
    _shaded_petal(pen, color, random, angle, length * random.uniform(0.9, 1.05),
                  width, pointedness, start)


def _draw_daisy(pen, color, random):
  count = random.integers(12, 22)
  disc = random.uniform(0.24, 0.32)
  width = random.uniform(0.75, 1.0) * 2 * np.pi * 0.62 / count
  _ring(pen, color, random, count, 1 - disc * 0.8, width, random.uniform(0.18, 0.35), disc * 0.8)
  disc_color = DISC_COLORS[random.integers(len(DISC_COLORS))] * random.uniform(0.85, 1.1)
  pen.disc([0, 0], disc * 1.05, disc_color * 0.55)
  pen.disc([0, 0], disc, disc_color * 0.9)
  pen.disc([-0.1 * disc, 0.1 * disc], disc * 0.7, disc_color * 1.1)
  for point in random.normal(0, disc * 0.45, [50, 2]):
    if np.hypot(*point) < disc * 0.95:
      pen.disc(point, 0.018, disc_color * random.uniform(0.65, 1.35))


def _draw_dandelion(pen, color, random):
  if random.random() < 0.25:
    _draw_seed_head(pen, random)
    return
  for layer in np.linspace(1.0, 0.18, 9):
    count = int(14 + 30 * layer)
    for angle in random.uniform(0, 2 * np.pi, count):
      length = layer * random.uniform(0.82, 1.06)
      floret = petal(length, 0.075, 1.0, square=True)
      shade = (0.62 + 0.5 * (1 - layer)) * random.uniform(0.85, 1.12)
      pen.polygon(turned(floret * [1.35, 1.01], angle), color * shade * 0.62)
      pen.polygon(turned(floret, angle), color * (shade + 0.16))
  for point in random.normal(0, 0.09, [35, 2]):
    pen.disc(point, 0.022, color * random.uniform(0.6, 1.1))


def _draw_seed_head(pen, random):
  """Draws the seed head of a dandelion."""
  hair = np.array([235, 232, 225]) * random.uniform(0.8, 1.05)
  pen.disc([0, 0], 1.0, hair, alpha=45)
  for _ in range(130):
    angle, distance = random.uniform(0, 2 * np.pi), np.sqrt(random.uniform(0.12, 0.9))
    tip = distance * np.array([np.cos(angle), np.sin(angle)])
    pen.line([tip * 0.12, tip], hair * 0.8, 0.008, alpha=120)
    pen.disc(tip * 0.25, 0.02, [90, 65, 45])
    for hair_angle in np.linspace(0, 2 * np.pi, 11)[:-1] + angle:
      end = tip + 0.15 * np.array([np.cos(hair_angle), np.sin(hair_angle)])
      pen.line([tip, end], hair, 0.008, alpha=190)
  pen.disc([0, 0], 0.14, [115, 95, 65])


def _draw_rose(pen, color, random):
  count = random.integers(17, 26)
  handedness = random.choice([-1, 1])
  for i in range(count):
    reach = 1 - 0.86 * i / count
    angle = handedness * i * GOLDEN_ANGLE
    turn = np.linspace(0, 2 * np.pi, 30)
    wave = 1 + 0.04 * np.sin(turn * random.integers(3, 6) + random.uniform(0, 6))
    outline = np.stack([0.62 * reach * np.cos(turn) * wave,
                        0.46 * reach + 0.5 * reach * np.sin(turn) * wave], 1)
    shade = random.uniform(0.85, 1.0) * (1.05 - 0.3 * i / count)
    pen.polygon(turned(outline * 1.03, angle), color * 0.42)
    pen.polygon(turned(outline, angle), color * shade * 1.12)
    pen.polygon(turned(outline * [0.94, 0.93], angle), color * shade * 0.97)
    pen.polygon(turned(outline * [0.86, 0.82], angle), color * shade * 0.8)
    pen.polygon(turned(outline * [0.72, 0.66], angle), color * shade * 0.64)
  turn = np.linspace(0.4, 3.2 * 2 * np.pi, 70)
  angle = handedness * turn
  spiral = 0.011 * turn[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
  pen.line(spiral, color * 0.4, 0.022)


def _draw_sunflower(pen, color, random):
  disc = random.uniform(0.46, 0.6)
  count = random.integers(18, 30)
  width = 2 * np.pi * 0.8 / count * random.uniform(0.95, 1.25)
  for phase, length in ((0.0, 1.0), (np.pi / count, 0.94)):
    _ring(pen, color, random, count, length - disc * 0.85, width, random.uniform(0.8, 1.1),
          disc * 0.85, phase)
  disc_color = DISC_COLORS[random.integers(len(DISC_COLORS))] * random.uniform(0.8, 1.0)
  pen.disc([0, 0], disc * 1.03, disc_color * 0.35)
  pen.disc([0, 0], disc, disc_color * 0.6)
  for i in range(260):
    distance = disc * 0.97 * np.sqrt(i / 260)
    point = distance * np.array([np.cos(i * GOLDEN_ANGLE), np.sin(i * GOLDEN_ANGLE)])
    pen.disc(point, 0.021, disc_color * (1.35 - 0.75 * distance / disc) * random.uniform(0.8, 1.2))


def _draw_tulip(pen, color, random):
  """Draws a cup seen from the side, with its petals from back to front."""
  opening = random.uniform(0.0, 0.3)
  petals = [(-0.3, 0.55, 0.9), (0.3, 0.55, 0.9), (0.0, 0.6, 1.0),
            (-0.2 - opening, 0.62, 0.97), (0.2 + opening, 0.62, 0.97), (0.0, 0.78, 0.86)]
  for i, (lean, width, height) in enumerate(petals):
    t = np.linspace(0, 1, 20)
    profile = (np.sin(np.pi * np.minimum(t * 0.62 + 0.12, 1)) ** 0.8
               * np.clip((1 - t) / 0.3, 0, 1)**0.6 * width / 2)
    height = 1.55 * height * random.uniform(0.95, 1.05)
    # All petals start at the stem and lean outwards in an arc.
    spine = np.stack([lean * np.sin(t * np.pi / 2) ** 0.7, -0.75 + t * height], 1)
    outline = np.concatenate([spine - profile[:, None] * [1, 0],
                              (spine + profile[:, None] * [1, 0])[::-1]])
    middle = outline.mean(0)
    shade = (0.72 if i < 3 else 0.95) * random.uniform(0.93, 1.05)
    pen.polygon((outline - middle) * 1.04 + middle, color * shade * 0.55)
    for k, tone in ((1.0, 0.86), (0.84, 0.97), (0.62, 1.05), (0.35, 1.12)):
      pen.polygon((outline - middle) * [k, 0.6 + 0.4 * k] + middle, color * shade * tone)
    pen.line(spine[2:-3], color * shade * 0.75, 0.015, alpha=170)


def _draw_stem(pen, random, leaf, width, bottom):
  """Draws a stem down from (0, bottom) with two leaves."""
  color = _leaf_color(random)
  bend = random.normal(0, 0.35)
  t = np.linspace(0, 1, 12)
  spine = np.stack([bend * t**2, bottom - 4.0 * t], 1)
  pen.line(spine, color * 0.6, width * 1.3)
  pen.line(spine - [width * 0.15, 0], color, width * 0.8)
  if leaf == 'blade':
    for side in (-1, 1):
      blade = petal(random.uniform(1.6, 2.4), random.uniform(0.28, 0.42), 0.9)
      at = [bend * 0.4, bottom - 2.6]
      pen.polygon(turned(blade * 1.03, side * random.uniform(0.1, 0.5)) + at, color * 0.6)
      pen.polygon(turned(blade, side * random.uniform(0.1, 0.5)) + at,
                  color * random.uniform(0.8, 1.1))
    return
  for side in (-1, 1):
    length, breadth = {'narrow': (0.8, 0.2), 'jagged': (1.1, 0.36),
                       'broad': (0.8, 0.5), 'heart': (1.0, 0.8)}[leaf]
    outline = petal(length, breadth, 0.7)
    if leaf == 'jagged':
      outline[:, 0] *= 1 - 0.65 * (np.arange(len(outline)) % 3 == 0)
    at = spine[random.integers(3, 6)]
    angle = side * random.uniform(0.8, 1.7)
    pen.polygon(turned(outline * 1.04, angle) + at, color * 0.55)
    pen.polygon(turned(outline, angle) + at, color * random.uniform(0.85, 1.15))
    pen.line(turned(np.array([[0, 0], [0, length * 0.9]]), angle) + at, color * 0.65, 0.02)


def _leaf_color(random):
  return LEAF_COLORS[random.integers(len(LEAF_COLORS))] * random.uniform(0.75, 1.2)


def _rgb(color):
  return tuple(int(c) for c in np.clip(color, 0, 255))
