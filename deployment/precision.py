"""The number formats and compilers of training, refused where the machine cannot do them."""

import os

import tensorflow.compat.v1 as tf
from tensorflow.core.protobuf import rewriter_config_pb2

# The check that Grappler itself makes; a CPU that fails it would quietly stay at float32.
from tensorflow.python.util import _pywrap_utils

from cpu_kernels import build
from deployment import towers

PRECISIONS = ('float32', 'bfloat16', 'float16')

# What stays float32 under --precision bfloat16 where build.cc does not do it, because
# oneDNN's bfloat16 kernels of it are slower than the float32 ones with the casts around
# them: 5 % of a training step on a CPU with AVX-512, 14 % on one with AMX.
FLOAT32_OPERATIONS = ('FusedBatchNormV3', 'FusedBatchNormGradV3',
                      'DepthwiseConv2dNativeBackpropFilter')


def check(precision, xla, devices):
  """Checks that the towers' devices can compute so.

  Args:
    precision: one of PRECISIONS.
    xla: whether XLA shall compile the graph.
    devices: device of each tower.

  Raises:
    towers.DeviceError: they cannot; the message says why.
  """
  on_cpu = devices[0].startswith('/cpu')
  if precision == 'float16' and on_cpu:
    raise towers.DeviceError('--precision float16 needs a GPU: a CPU computes slower with it '
                             'than with float32. Use bfloat16 or float32')
  if precision == 'bfloat16' and not on_cpu:
    raise towers.DeviceError('--precision bfloat16 needs a CPU: TensorFlow rewrites graphs to '
                             'bfloat16 for CPUs only. Use float16 or float32 on GPUs')
  if precision == 'bfloat16' and not _pywrap_utils.IsDataTypeSupportedByOneDNNOnThisCPU(
      tf.bfloat16.as_datatype_enum):
    raise towers.DeviceError('--precision bfloat16 needs a CPU with AVX-512 or newer '
                             'instructions, which this one lacks. Use float32')
  if xla and on_cpu:
    raise towers.DeviceError('--xla needs a GPU: on a CPU it makes training six times slower')


def set_session_options(config, precision, xla):
  """Sets how a session computes; the weights and moving statistics stay float32.

  Args:
    config: tf.ConfigProto, changed in place. For bfloat16 the environment of the
      process is changed too.
    precision, xla: as for `check`.
  """
  rewrites = config.graph_options.rewrite_options
  if precision == 'bfloat16':
    rewrites.auto_mixed_precision_onednn_bfloat16 = rewriter_config_pb2.RewriterConfig.ON
    # Grappler reads its lists of operations from the environment alone, at every rewrite,
    # and refuses an operation that is on two of them. A user's own changes stay.
    for change, names in (('ALLOWLIST_ADD', build.OPERATIONS),
                          ('DENYLIST_ADD', FLOAT32_OPERATIONS),
                          ('ALLOWLIST_REMOVE', FLOAT32_OPERATIONS),
                          ('INFERLIST_REMOVE', FLOAT32_OPERATIONS)):
      name = f'TF_AUTO_MIXED_PRECISION_GRAPH_REWRITE_{change}'
      operations = {*filter(None, os.environ.get(name, '').split(',')), *names}
      os.environ[name] = ','.join(sorted(operations))
  if precision == 'float16':
    rewrites.auto_mixed_precision = rewriter_config_pb2.RewriterConfig.ON
  if xla:
    config.graph_options.optimizer_options.global_jit_level = tf.OptimizerOptions.ON_1


def scale_loss(optimizer):
  """Wraps an optimizer for float16, whose small gradients would be 0.

  The loss is multiplied by a factor and the gradients divided by it. A step
  whose gradients are not finite is left out and halves the factor; 2,000 good
  ones double it (TensorFlow's defaults).
  """
  return tf.mixed_precision.MixedPrecisionLossScaleOptimizer(
      optimizer, tf.mixed_precision.DynamicLossScale())


def scales_loss(optimizer):
  """Returns whether `scale_loss` wrapped the optimizer."""
  return isinstance(optimizer, tf.mixed_precision.MixedPrecisionLossScaleOptimizer)
