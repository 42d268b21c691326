"""Gradients of 1 x 1 convolutions as matrix products, which CPUs compute faster.

  with fast_gradients.override():
    logits, _ = xception.xception(images, ...)

The network stays as slim defines it; only what TensorFlow's registered gradient
of `Conv2D` would do is done in another way, with the same numbers to rounding.
"""

import tensorflow.compat.v1 as tf
from tensorflow.python.framework import ops

GRADIENT_NAME = 'Conv2DGradientByMatMul'


def override():
  """Returns a context: convolutions that are built in it have these gradients."""
  return tf.get_default_graph().gradient_override_map({'Conv2D': GRADIENT_NAME})


@tf.RegisterGradient(GRADIENT_NAME)
def _conv2d_gradient(op, gradient):
  """Returns the gradients of a Conv2D with respect to its images and its kernel."""
  images, kernel = op.inputs
  _, stride, horizontal_stride, _ = op.get_attr('strides')
  is_pointwise = (kernel.shape[:2] == [1, 1] and stride == horizontal_stride
                  and images.shape[3] == kernel.shape[2]  # else it has groups
                  and op.get_attr('data_format') == b'NHWC'
                  and op.get_attr('padding') != b'EXPLICIT')
  if not is_pointwise or 'GPU' in op.device.upper():  # cuDNN needs no help
    return ops.gradient_registry.lookup('Conv2D')(op, gradient)

  # A 1 x 1 kernel with a stride sees the first pixel of each stride x stride square.
  # Pooling one pixel takes that pixel, in a fifth of a strided slice's time.
  seen = images if stride == 1 else tf.nn.avg_pool2d(images, 1, stride, 'SAME')
  channels_in, channels_out = kernel.shape.as_list()[2:]
  rows = tf.reshape(gradient, [-1, channels_out])
  kernel_gradient = tf.matmul(tf.reshape(seen, [-1, channels_in]), rows, transpose_a=True)
  seen_gradient = tf.matmul(rows, tf.reshape(kernel, [channels_in, channels_out]),
                            transpose_b=True)
  seen_gradient = tf.reshape(seen_gradient, tf.shape(seen))
  if stride > 1:
    seen_gradient = tf.raw_ops.AvgPoolGrad(
        orig_input_shape=tf.shape(images), grad=seen_gradient, ksize=[1, 1, 1, 1],
        strides=[1, stride, stride, 1], padding='SAME')
  return seen_gradient, tf.reshape(kernel_gradient, kernel.shape)
