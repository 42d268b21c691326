"""Shows which parts of an image speak for a class: Grad-CAM.

Selvaraju et al., *Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization*, 2017 (https://arxiv.org/abs/1610.02391), equations 1 and 2. A channel's
weight is the gradient of the class's logit with respect to the channel, averaged over
all cells; the map is the weighted sum of the channels, without its negative values.
"""

import slim_bridge  # noqa: F401, before TensorFlow: see there

import tensorflow.compat.v1 as tf

DEFAULT_LAYER = 'block14_dws_conv2'  # the last convolution, as the paper recommends


class LayerError(Exception):
  """The network has no such layer, or the layer has no map."""


def build_maps(logits, end_points, layer, classes):
  """Builds the Grad-CAM maps of one class for each image.

  Args:
    logits, end_points: see `xception.xception`; with is_training False, because a batch
      norm in training mode mixes the images.
    layer: name of an end point with more than one cell.
    classes: int64 [batch_size] in [0, num_classes).

  Returns:
    float32 [batch_size, rows, columns] of 0 or more, one number for each cell of the layer.

  Raises:
    LayerError: there is no such layer.
  """
  activations = _find_activations(end_points, layer)
  gradients, = tf.gradients(logits, activations, tf.one_hot(classes, logits.shape[-1]))
  weights = tf.reduce_mean(gradients, [1, 2], keepdims=True)
  return tf.nn.relu(tf.reduce_sum(weights * activations, -1))


def _find_activations(end_points, layer):
  """Returns the output of a layer, after the ReLU if one follows."""
  layers = [name for name, tensor in end_points.items()
            if tensor.shape.rank == 4 and tensor.shape[1:3].num_elements() > 1]
  if layer not in layers:
    raise LayerError(f'{layer!r} is not a layer whose output has rows and columns: choose one of '
                     f'{", ".join(layers)}')
  # The paper weights activations, but an end point comes before its ReLU.
  relus = [operation.outputs[0] for operation in end_points[layer].consumers()
           if operation.type == 'Relu']
  return relus[0] if relus else end_points[layer]
