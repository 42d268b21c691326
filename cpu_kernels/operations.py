"""Replaces the slow operations of a CPU training step with faster ones.

  with operations.replace_slow_operations():
    logits, _ = xception.xception(images, ...)

The network stays as slim defines it, and its numbers are the same up to rounding:
 - batch norms in training and 3 x 3 depthwise convolutions become operations of `kernels.cc`,
   with their ReLUs; a batch norm and a depthwise convolution become one operation if nothing
   else reads the tensors between them;
 - the gradients of 1 x 1 convolutions become matrix products.
Operations on a GPU stay as they are.
"""

import contextlib

import tensorflow.compat.v1 as tf
from tensorflow.python.framework import ops

from cpu_kernels import build

CONV2D_GRADIENT = 'Conv2DGradientByMatMul'
MIN_CHANNELS = 16  # of a depthwise convolution in kernels.cc


@contextlib.contextmanager
def replace_slow_operations():
  """Replaces slow operations that are built in this context when it ends.

  Take gradients after the context, and place operations for a GPU explicitly. The originals
  stay in the graph and run only if they are fetched, so end points keep their meaning.
  """
  graph = tf.get_default_graph()
  num_operations = len(graph.get_operations())
  with graph.gradient_override_map({'Conv2D': CONV2D_GRADIENT}):
    yield
  built = graph.get_operations()[num_operations:]
  batch_norms = list(filter(_is_batch_norm_in_training, built))
  depthwises = list(filter(_is_depthwise_3x3, built))
  if not batch_norms + depthwises or not (kernels := build.load()):
    return
  for op in batch_norms:
    depthwise = _depthwise_after(op)
    if depthwise in depthwises:
      depthwises.remove(depthwise)
      _replace_both(op, depthwise, kernels)
    else:
      _replace_batch_norm(op, kernels)
  for op in depthwises:
    _replace_depthwise(op, kernels)


def _is_batch_norm_in_training(op):
  return (op.type == 'FusedBatchNormV3' and op.get_attr('is_training')
          and op.get_attr('data_format') == b'NHWC' and op.inputs[0].dtype == tf.float32
          and not _is_on_gpu(op))


def _only_reader(op, op_type):
  """Returns the only reader of an operation's first output if it has that type, else None."""
  readers = op.outputs[0].consumers()
  return readers[0] if [reader.type for reader in readers] == [op_type] else None


def _depthwise_after(batch_norm):
  """Returns the depthwise convolution that can be fused with a batch norm, or None."""
  relu = _only_reader(batch_norm, 'Relu')
  depthwise = relu and _only_reader(relu, 'DepthwiseConv2dNative')
  # Their control inputs might depend on the batch norm.
  if depthwise and not relu.control_inputs + depthwise.control_inputs:
    return depthwise
  return None


def _replace_both(batch_norm, depthwise, kernels):
  """Replaces a batch norm, the ReLU after it and the depthwise convolution after that."""
  with _in_place_of(batch_norm):
    output, mean, variance, _ = kernels.xception_batch_norm_depthwise(
        *batch_norm.inputs[:3], depthwise.inputs[1], epsilon=batch_norm.get_attr('epsilon'),
        name=f'{depthwise.name}_fast')
  for old, new in zip([*depthwise.outputs, *batch_norm.outputs[1:3]], [output, mean, variance],
                      strict=True):
    _replace(old, new)


def _replace_batch_norm(op, kernels):
  """Replaces a batch norm, and the ReLU after it if that is its only reader."""
  relu = _only_reader(op, 'Relu')
  with _in_place_of(op):
    output, mean, variance, _ = kernels.xception_batch_norm(
        *op.inputs[:3], epsilon=op.get_attr('epsilon'), relu=relu is not None,
        name=f'{op.name}_fast')
  _replace((relu or op).outputs[0], output)
  _replace(op.outputs[1], mean)
  _replace(op.outputs[2], variance)


def _is_depthwise_3x3(op):
  if (op.type != 'DepthwiseConv2dNative' or op.inputs[0].dtype != tf.float32
      or _is_on_gpu(op)):
    return False
  channels = op.inputs[0].shape.as_list()[3]
  return (op.inputs[1].shape == [3, 3, channels, 1] and channels >= MIN_CHANNELS
          and op.get_attr('strides') == op.get_attr('dilations') == [1, 1, 1, 1]
          and op.get_attr('padding') == b'SAME' and op.get_attr('data_format') == b'NHWC')


def _replace_depthwise(op, kernels):
  """Replaces a depthwise convolution, and the ReLU before it if it is that one's only reader."""
  images, kernel = op.inputs
  relu = images.op.type == 'Relu' and images.consumers() == [op]
  with _in_place_of(op):
    output = kernels.xception_depthwise(images.op.inputs[0] if relu else images, kernel,
                                        relu=relu, name=f'{op.name}_fast')
  _replace(op.outputs[0], output)


@contextlib.contextmanager
def _in_place_of(op):
  """Builds operations on the device, and with the control inputs, of another one."""
  with tf.name_scope(None), tf.device(op.device), tf.control_dependencies(op.control_inputs):
    yield


def _replace(old, new):
  """Makes the readers of one tensor read another."""
  for reader in old.consumers():
    for i, tensor in enumerate(reader.inputs):
      if tensor is old:
        reader._update_input(i, new)  # pylint: disable=protected-access


@tf.RegisterGradient('XceptionBatchNorm')
def _batch_norm_gradient(op, gradient, *_):
  """Returns the gradients with respect to images, scale and offset."""
  _, mean, _, inverse_deviation = op.outputs
  return build.load().xception_batch_norm_grad(
      gradient, *op.inputs, mean, inverse_deviation, relu=op.get_attr('relu'))


@tf.RegisterGradient('XceptionBatchNormDepthwise')
def _batch_norm_depthwise_gradient(op, gradient, *_):
  """Returns the gradients with respect to images, scale, offset and kernel."""
  _, mean, _, inverse_deviation = op.outputs
  return build.load().xception_batch_norm_depthwise_grad(
      gradient, *op.inputs, mean, inverse_deviation)


@tf.RegisterGradient('XceptionDepthwise')
def _depthwise_gradient(op, gradient):
  """Returns the gradients with respect to images and kernel."""
  return build.load().xception_depthwise_grad(gradient, *op.inputs, relu=op.get_attr('relu'))


@tf.RegisterGradient(CONV2D_GRADIENT)
def _conv2d_gradient(op, gradient):
  """Returns the gradients of a Conv2D with respect to images and kernel."""
  images, kernel = op.inputs
  _, stride, horizontal_stride, _ = op.get_attr('strides')
  is_pointwise = (kernel.shape[:2] == [1, 1] and stride == horizontal_stride
                  and images.shape[3] == kernel.shape[2]  # no groups
                  and op.get_attr('data_format') == b'NHWC'
                  and op.get_attr('padding') != b'EXPLICIT')
  if not is_pointwise or _is_on_gpu(op):
    return ops.gradient_registry.lookup('Conv2D')(op, gradient)

  # A 1 x 1 kernel with a stride sees the first pixel of each stride x stride square. Pooling
  # with window 1 selects the same pixels in a fifth of the time of a strided slice.
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


def _is_on_gpu(op):
  return 'GPU' in op.device.upper()
