"""Inception preprocessing of one image, as TF-Slim trains and evaluates Xception.

  image = xception_preprocessing.preprocess_image(image, 299, 299, is_training=True)

Training takes a random crop, resizes it without preserving its aspect ratio,
flips it and shifts its colours. Evaluation takes the central 87.5 %. The random
numbers of a distortion are drawn first (`draw_distortion`) and then applied
(`apply_distortion`), so that the same draws always give the same pixels.

All resizing is TensorFlow 1's, which samples at pixel corners rather than at
half-pixel centres; `tf.image.resize` of TensorFlow 2 differs by up to 25/255.
"""

import collections

from tensorflow.compat import v2 as tf2
import tensorflow.compat.v1 as tf

# Inception's distortions (TF-Slim, inception_preprocessing).
MIN_OBJECT_COVERED = 0.1
ASPECT_RATIO_RANGE = (0.75, 1.33)  # width / height of the crop
AREA_RANGE = (0.05, 1.0)  # of the crop, in fractions of the image's area
MAX_ATTEMPTS = 100
MAX_BRIGHTNESS_DELTA = 32.0 / 255.0
SATURATION_RANGE = (0.5, 1.5)
CONTRAST_RANGE = (0.5, 1.5)
MAX_HUE_DELTA = 0.2
CENTRAL_FRACTION = 0.875  # of each side, at evaluation

# Gives the pixels of PIL and OpenCV; TensorFlow's default is faster and less accurate.
DCT_METHOD = 'INTEGER_ACCURATE'

RESIZE_METHODS = (
    tf.image.ResizeMethod.BILINEAR,
    tf.image.ResizeMethod.NEAREST_NEIGHBOR,
    tf.image.ResizeMethod.BICUBIC,
    tf.image.ResizeMethod.AREA,
)
# `Distortion.color_ordering` selects a row. Fast mode repeats one row three times, so
# that a quarter of the images have their brightness shifted first.
FAST_COLOR_ORDERINGS = (
    ('brightness', 'saturation'),
    ('saturation', 'brightness'),
    ('saturation', 'brightness'),
    ('saturation', 'brightness'),
)
FULL_COLOR_ORDERINGS = (
    ('brightness', 'saturation', 'hue', 'contrast'),
    ('saturation', 'brightness', 'contrast', 'hue'),
    ('contrast', 'hue', 'brightness', 'saturation'),
    ('hue', 'saturation', 'contrast', 'brightness'),
)

Distortion = collections.namedtuple('Distortion', [
    'begin',  # int32 [3], the crop's first row, column and channel
    'size',  # int32 [3], the crop's rows, columns and -1 for all channels
    'box',  # float32 [1, 1, 4], the crop in fractions of the image, for drawing
    'resize_method',  # int32 [], index into RESIZE_METHODS
    'flip',  # bool [], whether left and right are exchanged
    'color_ordering',  # int32 [], index into the colour orderings
    'brightness',  # float32 [], added
    'saturation',  # float32 [], factor
    'contrast',  # float32 [], factor
    'hue',  # float32 [], added, in full turns of the colour wheel
])


def preprocess_image(image, height, width, is_training=False, bbox=None, fast_mode=True,
                     add_image_summaries=True, seed=None, area_range=AREA_RANGE):
  """Turns a decoded image into the network's input.

  Args:
    image: [image_height, image_width, 3], uint8 in [0, 255] or another integer
      type's range, or float in [0, 1].
    height, width: output size in pixels; at evaluation both may be None, which
      keeps the size of the central crop.
    is_training: Python bool; True distorts, False takes the central crop.
    bbox: float32 [1, boxes, 4] of (ymin, xmin, ymax, xmax) in [0, 1], objects
      that a training crop must partly cover; None is the whole image.
    fast_mode: True resizes bilinearly and shifts brightness and saturation;
      False draws one of four resize methods and also shifts contrast and hue.
    add_image_summaries: True adds an image summary after each step of a
      distortion (in the current graph: summaries inside a tf.data map are lost).
    seed: integer [2]; the same seed distorts an image in the same way. None
      draws a new one at every step.
    area_range: smallest and largest area of a training crop, in fractions of the
      image's area in (0, 1].

  Returns:
    float32 [height, width, 3] in [-1, 1].
  """
  if is_training:
    return preprocess_for_train(image, height, width, bbox, fast_mode,
                                add_image_summaries, seed, area_range)
  return preprocess_for_eval(image, height, width)


def preprocess_for_train(image, height, width, bbox=None, fast_mode=True,
                         add_image_summaries=True, seed=None, area_range=AREA_RANGE):
  """Distorts one image at random; arguments and result as `preprocess_image`."""
  with tf.name_scope('distort_image'):
    if seed is None:
      seed = tf.random.uniform([2], maxval=tf.int64.max, dtype=tf.int64)
    distortion = draw_distortion(tf.shape(image), seed, bbox, fast_mode, area_range)
    return apply_distortion(image, distortion, height, width, fast_mode,
                            bbox, add_image_summaries)


def preprocess_for_eval(image, height, width, central_fraction=CENTRAL_FRACTION):
  """Takes the central crop of one image; see `preprocess_image`."""
  with tf.name_scope('eval_image'):
    image = tf.image.convert_image_dtype(image, tf.float32)
    if central_fraction:
      image = tf.image.central_crop(image, central_fraction)
    if height and width:
      image = tf.image.resize_bilinear(image[tf.newaxis], [height, width],
                                       align_corners=False)[0]
    return _to_network_range(image)


def decode(encoded):
  """Decodes the bytes of a JPEG, PNG, BMP, WebP or GIF file into uint8 [height, width, 3].

  Of an animated GIF it decodes the first frame; an alpha channel is dropped.
  """
  return tf.cond(
      tf.image.is_jpeg(encoded),
      lambda: tf.image.decode_jpeg(encoded, channels=3, dct_method=DCT_METHOD),
      lambda: _decode_other(encoded))


def _decode_other(encoded):
  # A WebP file decodes only to the channels that it has.
  is_webp = tf.strings.regex_full_match(tf.strings.substr(encoded, 0, 12), r'RIFF\C{4}WEBP')
  image = tf.cond(
      is_webp,
      lambda: tf.image.decode_image(encoded, channels=0, expand_animations=False)[..., :3],
      lambda: tf.image.decode_image(encoded, channels=3, expand_animations=False))
  return tf.ensure_shape(image, [None, None, 3])


def decode_and_distort(encoded, height, width, seed, area_range=AREA_RANGE):
  """Decodes and distorts an image: a faster `preprocess_for_train(decode(encoded))`.

  Only the crop of a JPEG is decoded, whose window follows from the header, and
  the colours are shifted in one compiled pass. The pixels equal those of
  `preprocess_for_train` in fast mode to float rounding.

  Args:
    encoded: string [], bytes of a file that `decode` decodes.
    height, width, seed, area_range: as in `preprocess_image`.

  Returns:
    float32 [height, width, 3] in [-1, 1].
  """
  def decode_crop_of_jpeg():
    shape = tf.image.extract_jpeg_shape(encoded)
    distortion = draw_distortion(shape, seed, area_range=area_range)
    return (_decode_jpeg_crop(encoded, shape, distortion), *distortion)

  def crop_of_decoded():
    image = _decode_other(encoded)
    distortion = draw_distortion(tf.shape(image), seed, area_range=area_range)
    return (tf.slice(image, distortion.begin, distortion.size), *distortion)

  crop, *fields = tf.cond(tf.image.is_jpeg(encoded), decode_crop_of_jpeg, crop_of_decoded)
  distortion = Distortion(*fields)
  image = tf.image.convert_image_dtype(tf.ensure_shape(crop, [None, None, 3]), tf.float32)
  image = _resize(image, height, width, distortion.resize_method, fast_mode=True)
  image = tf.cond(distortion.flip, lambda: tf.image.flip_left_right(image), lambda: image)
  brightness_first = tf.equal(distortion.color_ordering, 0)
  return _distort_color_compiled(image, brightness_first, distortion.brightness,
                                 distortion.saturation)


@tf2.function(jit_compile=True, autograph=False)
def _distort_color_compiled(image, brightness_first, brightness, saturation):
  """Shifts brightness and saturation in one pass, where `_distort_color` takes a dozen.

  Multiplying the saturation by f scales each channel's distance from the largest
  channel v by f, or by as much as brings the smallest channel m to 0:
  v - (v - c) * min(f, v / (v - m)).
  """
  image += tf.where(brightness_first, brightness, 0.0)
  red, green, blue = image[..., 0:1], image[..., 1:2], image[..., 2:3]
  greatest = tf.maximum(tf.maximum(red, green), blue)
  smallest = tf.minimum(tf.minimum(red, green), blue)
  chroma = tf.maximum(greatest - smallest, 1e-9)
  image = greatest - (greatest - image) * tf.minimum(saturation, greatest / chroma)
  image += tf.where(brightness_first, 0.0, brightness)
  return _to_network_range(tf.clip_by_value(image, 0.0, 1.0))


def _decode_jpeg_crop(encoded, shape, distortion):
  # JPEG stores colours at half the resolution and interpolates them: without one more
  # column on either side, the colours at the edges would differ.
  top, left = distortion.begin[0], distortion.begin[1]
  height, width = distortion.size[0], distortion.size[1]
  wide_left = tf.maximum(left - 1, 0)
  wide_right = tf.minimum(left + width + 1, shape[1])
  crop = tf.image.decode_and_crop_jpeg(
      encoded, [top, wide_left, height, wide_right - wide_left], channels=3,
      dct_method=DCT_METHOD)
  return crop[:, left - wide_left:left - wide_left + width]


def draw_distortion(image_shape, seed, bbox=None, fast_mode=True, area_range=AREA_RANGE):
  """Draws all random numbers of one image's distortion.

  Args:
    image_shape: int32 [3], the image's height, width and channels.
    seed: integer [2]; the result is a pure function of the arguments.
    bbox, fast_mode, area_range: as in `preprocess_image`.

  Returns:
    A `Distortion` of tensors.
  """
  box_seed, number_seed = tf.unstack(tf.random.split(seed, 2))
  begin, size, box = tf2.image.stateless_sample_distorted_bounding_box(
      image_shape,
      bounding_boxes=_whole_image() if bbox is None else bbox,
      seed=box_seed,
      min_object_covered=MIN_OBJECT_COVERED,
      aspect_ratio_range=ASPECT_RATIO_RANGE,
      area_range=area_range,
      max_attempts=MAX_ATTEMPTS,
      use_image_if_no_bounding_boxes=True)

  # All numbers at once, because running an op costs more than these few numbers do.
  numbers = iter(tf.unstack(tf.random.stateless_uniform([7], number_seed)))

  def uniform(low, high):
    return low + (high - low) * next(numbers)

  resize_method, color_ordering = (tf.cast(uniform(0.0, 4.0), tf.int32) for _ in range(2))
  return Distortion(
      begin=begin,
      size=size,
      box=box,
      resize_method=tf.constant(0) if fast_mode else resize_method,
      flip=next(numbers) < 0.5,
      color_ordering=color_ordering,
      brightness=uniform(-MAX_BRIGHTNESS_DELTA, MAX_BRIGHTNESS_DELTA),
      saturation=uniform(*SATURATION_RANGE),
      contrast=uniform(*CONTRAST_RANGE),
      hue=uniform(-MAX_HUE_DELTA, MAX_HUE_DELTA))


def apply_distortion(image, distortion, height, width, fast_mode=True,
                     bbox=None, add_image_summaries=False):
  """Applies drawn distortions to one image.

  Args:
    image: as in `preprocess_image`.
    distortion: a `Distortion`; its fields may be tensors or plain numbers.
    height, width: output size in pixels.
    fast_mode: as it was drawn.
    bbox, add_image_summaries: as in `preprocess_image`.

  Returns:
    float32 [height, width, 3] in [-1, 1].
  """
  if add_image_summaries:
    _summarize_boxes(image, _whole_image() if bbox is None else bbox, distortion.box)

  # The slice loses the static number of channels.
  image = tf.ensure_shape(tf.slice(image, distortion.begin, distortion.size), [None, None, 3])
  image = tf.image.convert_image_dtype(image, tf.float32)
  image = _resize(image, height, width, distortion.resize_method, fast_mode)
  if add_image_summaries:
    tf.summary.image('cropped_resized_image', image[tf.newaxis])

  flipped = tf.image.flip_left_right(image)
  image = tf.where(tf.broadcast_to(distortion.flip, tf.shape(image)), flipped, image)

  image = _distort_color(image, distortion, fast_mode)
  if add_image_summaries:
    tf.summary.image('final_distorted_image', image[tf.newaxis])
  return _to_network_range(image)


def _resize(image, height, width, method, fast_mode):
  if fast_mode:
    return tf.image.resize_bilinear(image[tf.newaxis], [height, width],
                                    align_corners=False)[0]

  def resize_by(resize_method):
    return lambda: tf.image.resize_images(image, [height, width], resize_method,
                                          align_corners=False)

  image = tf.switch_case(tf.convert_to_tensor(method), [resize_by(m) for m in RESIZE_METHODS])
  return tf.ensure_shape(image, [height, width, 3])


def _distort_color(image, distortion, fast_mode):
  """Shifts the colours in the drawn order, and clips them to [0, 1] once, at the end."""
  shifts = {
      'brightness': lambda net: tf.image.adjust_brightness(net, distortion.brightness),
      'saturation': lambda net: tf.image.adjust_saturation(net, distortion.saturation),
      'contrast': lambda net: tf.image.adjust_contrast(net, distortion.contrast),
      'hue': lambda net: tf.image.adjust_hue(net, distortion.hue),
  }

  def shift_in_order(names):
    def shift():
      net = image
      for name in names:
        net = shifts[name](net)
      return net
    return shift

  orderings = FAST_COLOR_ORDERINGS if fast_mode else FULL_COLOR_ORDERINGS
  image = tf.switch_case(tf.convert_to_tensor(distortion.color_ordering),
                         [shift_in_order(names) for names in orderings])
  return tf.clip_by_value(image, 0.0, 1.0)


def _summarize_boxes(image, bbox, distorted_box):
  images = tf.image.convert_image_dtype(image, tf.float32)[tf.newaxis]
  red = [[1.0, 0.0, 0.0]]
  tf.summary.image('image_with_bounding_boxes',
                   tf2.image.draw_bounding_boxes(images, bbox, red))
  tf.summary.image('images_with_distorted_bounding_box',
                   tf2.image.draw_bounding_boxes(images, distorted_box, red))


def _whole_image():
  return tf.constant([0.0, 0.0, 1.0, 1.0], shape=[1, 1, 4])


def _to_network_range(image):
  return (image - 0.5) * 2.0
