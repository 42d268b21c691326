"""Xception, as a TF-Slim network.

Figure 5 of "Xception: Deep Learning with Depthwise Separable Convolutions" (Chollet,
https://arxiv.org/abs/1610.02357), with the parameters of `keras.applications.Xception`:
22,855,952 trainable ones for 1000 classes.

  import xception
  import tf_slim as slim

  with slim.arg_scope(xception.xception_arg_scope()):
    logits, end_points = xception.xception(images, num_classes=5)

Importing this module makes tf-slim work on TensorFlow 2.
"""

import slim_bridge  # noqa: F401, before TensorFlow: see there

import tensorflow.compat.v1 as tf
import tf_slim as slim

# The middle flow repeats a block of three separable convolutions (paper, figure 5).
MIDDLE_FLOW_DEPTH = 728
MIDDLE_FLOW_BLOCKS = 8

MIN_IMAGE_SIZE = 71  # that of keras.applications.Xception


def xception(inputs,
             num_classes=1001,
             is_training=True,
             dropout_keep_prob=0.5,
             dropout_seed=None,
             fc_layers=(),
             depth_multiplier=1.0,
             min_depth=16,
             prediction_fn=slim.softmax,
             spatial_squeeze=True,
             reuse=None,
             scope='Xception'):
  """Builds the Xception network; call it under `xception_arg_scope()`.

  Comments give the shapes for a 299 x 299 image.

  Args:
    inputs: float32 [batch_size, height, width, 3] in [-1, 1]; height and width are 71 or more
      and may differ; the batch size may be unknown.
    num_classes: number of classes; 0 or None omits dropout and logits and returns the
      features before them as `logits`, like slim's networks.
    is_training: Python bool; True uses the batch's statistics and dropout.
    dropout_keep_prob: float in (0, 1], share of the features kept before the logits during
      training (paper: 0.5 on ImageNet, 1.0 on JFT).
    dropout_seed: integer tensor [2]; the same seed drops the same features. None draws new
      ones at every step.
    fc_layers: widths of the paper's optional fully connected layers before the logits, for
      example (4096, 4096).
    depth_multiplier: float > 0, scales the depth of every convolution.
    min_depth: int, lower bound of a scaled depth.
    prediction_fn: turns logits into end_points['Predictions'].
    spatial_squeeze: True gives logits [batch_size, num_classes], False
      [batch_size, 1, 1, num_classes].
    reuse: True uses the variables of an earlier call with the same scope.
    scope: name of the variable scope.

  Returns:
    logits: float32, see `spatial_squeeze`; before the softmax.
    end_points: {layer name: output} of every convolution (after its batch norm, before any
      ReLU), every residual branch, `block15_avg_pool`, `Logits` and `Predictions`.

  Raises:
    ValueError: depth_multiplier is not positive, or an image side is shorter than 71.
  """
  if depth_multiplier <= 0:
    raise ValueError(f'depth_multiplier must be greater than 0, got {depth_multiplier}')
  _check_image_size(inputs)
  end_points = {}

  def depth(channels):
    return max(int(channels * depth_multiplier), min_depth)

  def conv(net, channels, kernel_size, name, **kwargs):
    end_points[name] = slim.conv2d(net, depth(channels), kernel_size, scope=name, **kwargs)
    return end_points[name]

  def separable_conv(net, channels, name):
    end_points[name] = slim.separable_conv2d(net, depth(channels), [3, 3], scope=name)
    return end_points[name]

  def downsample(net, residual_input, channels, block, residual_block):
    residual = conv(residual_input, channels, [1, 1], f'{residual_block}_res_conv', stride=2)
    net = slim.max_pool2d(net, [3, 3], stride=2, padding='SAME', scope=f'{block}_max_pool')
    return tf.add(net, residual, name=f'{block}_add')

  with tf.variable_scope(scope, 'Xception', [inputs], reuse=reuse), \
       slim.arg_scope([slim.batch_norm, slim.dropout], is_training=is_training):
    # Entry flow.
    net = conv(inputs, 32, [3, 3], 'block1_conv1', stride=2, padding='VALID')
    net = tf.nn.relu(net)  # 149 x 149 x 32
    net = conv(net, 64, [3, 3], 'block1_conv2', padding='VALID')
    net = residual = tf.nn.relu(net)  # 147 x 147 x 64

    net = separable_conv(net, 128, 'block2_dws_conv1')
    net = separable_conv(tf.nn.relu(net), 128, 'block2_dws_conv2')
    net = residual = downsample(net, residual, 128, 'block2', 'block1')  # 74 x 74 x 128

    net = separable_conv(tf.nn.relu(net), 256, 'block3_dws_conv1')
    net = separable_conv(tf.nn.relu(net), 256, 'block3_dws_conv2')
    net = residual = downsample(net, residual, 256, 'block3', 'block2')  # 37 x 37 x 256

    net = separable_conv(tf.nn.relu(net), MIDDLE_FLOW_DEPTH, 'block4_dws_conv1')
    net = separable_conv(tf.nn.relu(net), MIDDLE_FLOW_DEPTH, 'block4_dws_conv2')
    net = downsample(net, residual, MIDDLE_FLOW_DEPTH, 'block4', 'block3')  # 19 x 19 x 728

    # Middle flow.
    for block in range(5, 5 + MIDDLE_FLOW_BLOCKS):
      residual = net
      for i in range(1, 4):
        net = separable_conv(tf.nn.relu(net), MIDDLE_FLOW_DEPTH, f'block{block}_dws_conv{i}')
      net = tf.add(net, residual, name=f'block{block}_add')  # 19 x 19 x 728

    # Exit flow.
    residual = net
    net = separable_conv(tf.nn.relu(net), MIDDLE_FLOW_DEPTH, 'block13_dws_conv1')
    net = separable_conv(tf.nn.relu(net), 1024, 'block13_dws_conv2')
    net = downsample(net, residual, 1024, 'block13', 'block12')  # 10 x 10 x 1024

    net = separable_conv(net, 1536, 'block14_dws_conv1')
    net = separable_conv(tf.nn.relu(net), 2048, 'block14_dws_conv2')
    net = tf.nn.relu(net)  # 10 x 10 x 2048

    # The mean over all remaining pixels supports any image size.
    net = tf.reduce_mean(net, [1, 2], keepdims=True, name='block15_avg_pool')  # 1 x 1 x 2048
    end_points['block15_avg_pool'] = net

    with slim.arg_scope([slim.conv2d], normalizer_fn=None,
                        biases_initializer=tf.zeros_initializer()):
      for i, width in enumerate(fc_layers, 1):
        net = slim.conv2d(net, width, [1, 1], activation_fn=tf.nn.relu, scope=f'fc{i}')
        end_points[f'fc{i}'] = net

      if not num_classes:
        return _squeeze(net, spatial_squeeze), end_points

      if is_training:
        # On two axes: on four, the random mask makes TensorFlow's layout optimizer give up on
        # the whole graph, which then stays NHWC on GPUs.
        net = _dropout(tf.squeeze(net, [1, 2]), dropout_keep_prob, dropout_seed)
        net = net[:, tf.newaxis, tf.newaxis]
      # On a 1 x 1 image this is the paper's dense layer.
      logits = slim.conv2d(net, num_classes, [1, 1], scope='Logits')
      logits = _squeeze(logits, spatial_squeeze)
      end_points['Logits'] = logits
      end_points['Predictions'] = prediction_fn(logits, scope='Predictions')
  return logits, end_points


xception.default_image_size = 299


def xception_arg_scope(weight_decay=1e-5,
                       batch_norm_decay=0.99,
                       batch_norm_epsilon=0.001,
                       batch_norm_scale=True,
                       batch_norm_updates_collections=(tf.GraphKeys.UPDATE_OPS,)):
  """Returns the arg scope that configures slim's layers for Xception.

  Args:
    weight_decay: float, L2 regularization of every kernel (paper, section 4.3: 1e-5);
      biases and batch norms have none.
    batch_norm_decay: float or scalar float32 tensor in [0, 1), decay of the moving statistics
      (Keras: 0.99). Training from scratch should use `warmed_up_decay`.
    batch_norm_epsilon: float, added to the variance (Keras: 0.001).
    batch_norm_scale: whether a batch norm has gamma, as in the paper's network.
    batch_norm_updates_collections: collections of the updates of the moving statistics, which
      must run with the train op.

  Returns:
    A slim arg scope.
  """
  batch_norm_params = {
      'decay': batch_norm_decay,
      'epsilon': batch_norm_epsilon,
      'center': True,
      'scale': batch_norm_scale,
      # A list selects slim's fused path, which works on TensorFlow 2: see slim_bridge.
      'updates_collections': list(batch_norm_updates_collections),
  }
  with slim.arg_scope([slim.conv2d, slim.separable_conv2d],
                      activation_fn=None,
                      normalizer_fn=slim.batch_norm,
                      normalizer_params=batch_norm_params,
                      weights_regularizer=_l2_regularizer(weight_decay)), \
       slim.arg_scope([slim.conv2d], weights_initializer=_he_normal(2.0)), \
       slim.arg_scope([slim.separable_conv2d],
                      depth_multiplier=1,
                      weights_initializer=_depthwise_he_normal(),
                      pointwise_initializer=_he_normal(1.0)) as scope:
    return scope


def warmed_up_decay(decay, global_step):
  """Returns min(decay, (1 + step) / (10 + step)), which follows quickly in the first steps.

  With the constant decay 0.99, moving statistics keep 60 % of their initial values after 50
  steps, so a briefly trained network evaluates at chance although it has learned. Warmed up,
  they keep less than a thousandth after 5 steps; the decay reaches 0.99 at step 890.
  `tf.train.ExponentialMovingAverage` uses the same formula.

  Args:
    decay: float in [0, 1), reached after 9 / (1 - decay) steps.
    global_step: integer scalar tensor, steps taken so far.

  Returns:
    float32 scalar tensor, for `batch_norm_decay`.
  """
  step = tf.cast(global_step, tf.float32)
  return tf.minimum(decay, (1.0 + step) / (10.0 + step), name='batch_norm_decay')


def _l2_regularizer(weight_decay):
  regularizer = slim.l2_regularizer(weight_decay)

  def regularize(weights):
    with tf.device(weights.device):  # not the first tower's, which may be another one
      return regularizer(weights)
  return regularize


def _he_normal(gain):
  # Preserves the second moment: gain 2.0 after a ReLU, which halves it, 1.0 otherwise.
  return tf.variance_scaling_initializer(gain, mode='fan_in', distribution='truncated_normal')


def _depthwise_he_normal():
  # Each output of a depthwise 3 x 3 kernel has 9 inputs, but variance_scaling_initializer would
  # count 9 * channels, and the signal would shrink in every layer. All depthwise kernels but one
  # follow a ReLU, hence the variance 2 / 9. Truncating a normal distribution at two standard
  # deviations multiplies its standard deviation by 0.87962566.
  return tf.truncated_normal_initializer(stddev=(2.0 / 9.0)**0.5 / 0.87962566)


def _dropout(net, keep_prob, seed):
  if seed is None:
    return slim.dropout(net, keep_prob=keep_prob, scope='dropout')
  return tf.nn.experimental.stateless_dropout(
      net, 1.0 - keep_prob, seed, rng_alg='philox', name='dropout')


def _squeeze(net, spatial_squeeze):
  return tf.squeeze(net, [1, 2], name='SpatialSqueeze') if spatial_squeeze else net


def _check_image_size(inputs):
  height, width = inputs.shape.as_list()[1:3]
  if min(height or MIN_IMAGE_SIZE, width or MIN_IMAGE_SIZE) < MIN_IMAGE_SIZE:
    raise ValueError(f'Xception needs images of {MIN_IMAGE_SIZE} x {MIN_IMAGE_SIZE} pixels '
                     f'or more, got {height} x {width}')
