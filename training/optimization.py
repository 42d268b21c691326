"""Recipes, learning rate schedules and optimizers.

A `Recipe` holds every hyperparameter of the optimization. Its fields are
train_flowers.py's options, under TF-Slim's names.
"""

import dataclasses
import math

import tensorflow.compat.v1 as tf

from common import arguments
import xception_preprocessing


def _option(default, text, option_type=None, aliases=(), choices=None):
  """Returns a dataclass field that also describes its command-line option; see `options`."""
  return dataclasses.field(default=default, metadata={
      'help': text, 'type': option_type, 'aliases': aliases, 'choices': choices})


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Hyperparameters, each a command-line option; the defaults are the recipe for the flowers."""
  optimizer: str = _option('adam', 'sgd uses momentum',
                           choices=['adam', 'adamw', 'rmsprop', 'sgd'])
  learning_rate: float = _option(
      0.002, 'the highest rate of the schedule', arguments.positive_float,
      ['--initial_learning_rate'])
  learning_rate_decay_type: str = _option(
      'polynomial', 'polynomial decays linearly to --end_learning_rate, cosine along half a '
      'cosine wave', choices=['fixed', 'exponential', 'polynomial', 'cosine'])
  learning_rate_decay_factor: float = _option(
      0.94, 'exponential decay: factor of each decay', arguments.positive_float)
  num_epochs_per_decay: float = _option(
      2.0, 'exponential decay: epochs between decays', arguments.positive_float,
      ['--num_epochs_before_decay'])
  num_samples_per_decay: int = _option(
      0, 'exponential decay: images between decays; 0 counts epochs instead',
      arguments.non_negative_int)
  staircase: bool = _option(True, 'exponential decay happens in discrete steps')
  end_learning_rate: float = _option(
      0.00001, 'lower bound of the rate', arguments.non_negative_float)
  warmup_epochs: float = _option(
      0.0, 'epochs of linear warm-up from 0', arguments.non_negative_float)
  momentum: float = _option(
      0.9, 'momentum of sgd and rmsprop', arguments.fraction, ['--rmsprop_momentum'])
  nesterov: bool = _option(False, 'sgd uses Nesterov momentum')
  rmsprop_decay: float = _option(
      0.9, "decay of rmsprop's mean squared gradient", arguments.fraction)
  adam_beta1: float = _option(0.9, 'decay of the mean gradient', arguments.fraction)
  adam_beta2: float = _option(0.999, 'decay of the mean squared gradient', arguments.fraction)
  opt_epsilon: float = _option(
      1e-7, 'added to the denominator by adam, adamw and rmsprop', arguments.positive_float)
  weight_decay: float = _option(
      0.00001, 'L2 regularization of the kernels; decoupled from the gradient with adamw',
      arguments.non_negative_float)
  label_smoothing: float = _option(
      0.0, 'fraction of the label that is spread over all classes', arguments.fraction)
  dropout_keep_prob: float = _option(
      0.5, 'probability of keeping a feature before the logits', arguments.positive_fraction)
  batch_norm_decay: float = _option(
      0.99, 'decay of the moving statistics, once warmed up', arguments.fraction)
  min_crop_area: float = _option(
      xception_preprocessing.AREA_RANGE[0],
      "smallest area of a training crop, in fractions of the image's area",
      arguments.positive_fraction)
  clip_gradient_norm: float = _option(
      0.0, 'clips the global norm of the gradients to this; 0 does not clip',
      arguments.non_negative_float)
  moving_average_decay: float = _option(
      0.0, 'decay of the Polyak averages of the weights, once warmed up; 0 keeps none',
      arguments.fraction)


RECIPES = {
    'flowers': Recipe(),
    # What trained best from scratch on some thousand photographs: docs/photographs.md.
    'photographs': Recipe(
        optimizer='adamw', learning_rate=0.002, learning_rate_decay_type='cosine',
        warmup_epochs=1.0, weight_decay=0.05, label_smoothing=0.1, dropout_keep_prob=0.8,
        min_crop_area=0.5, moving_average_decay=0.99),
    # Chollet, section 4.3. The paper gives no decay for its average of the weights:
    # 0.9999 is TF-Slim's for Inception.
    'imagenet': Recipe(
        optimizer='sgd', learning_rate=0.045, learning_rate_decay_type='exponential',
        learning_rate_decay_factor=0.94, num_epochs_per_decay=2.0, end_learning_rate=0.0,
        momentum=0.9, weight_decay=1e-5, dropout_keep_prob=0.5, moving_average_decay=0.9999),
    'jft': Recipe(
        optimizer='rmsprop', learning_rate=0.001, learning_rate_decay_type='exponential',
        learning_rate_decay_factor=0.9, num_samples_per_decay=3_000_000, end_learning_rate=0.0,
        momentum=0.9, weight_decay=1e-5, dropout_keep_prob=1.0, moving_average_decay=0.9999),
}


def describe(recipe):
  """Returns the recipe as a line of text, like 'optimizer adam, learning_rate 0.002, ...'."""
  return ', '.join(f'{name} {value}' for name, value in dataclasses.asdict(recipe).items())


def build_learning_rate(recipe, images_seen, num_samples, batch_size, total_images):
  """Returns the learning rate of this step, a float32 scalar tensor.

  The schedule counts images, so it does not depend on the batch size or the number of towers.

  Args:
    recipe: a Recipe. Its schedule is one of
      'fixed': learning_rate;
      'exponential': learning_rate * learning_rate_decay_factor^decays, where
        decays is a whole number if `staircase`;
      'polynomial': a line from learning_rate to end_learning_rate at total_images;
      'cosine': half a cosine between the same two;
      never below end_learning_rate, and multiplied by the fraction of the warm-up's
      images seen after this step.
    images_seen: int64 [], before this step.
    num_samples: images per epoch.
    batch_size: images per step, summed over towers.
    total_images: number of images seen at the end of training.
  """
  images = tf.cast(images_seen, tf.float64)  # float32 cannot count beyond 2^24
  highest, lowest = recipe.learning_rate, recipe.end_learning_rate
  progress = tf.minimum(images / total_images, 1.0)
  if recipe.learning_rate_decay_type == 'fixed':
    rate = tf.constant(highest, tf.float64)
  elif recipe.learning_rate_decay_type == 'polynomial':
    rate = highest + (lowest - highest) * progress
  elif recipe.learning_rate_decay_type == 'cosine':
    rate = lowest + (highest - lowest) * 0.5 * (1.0 + tf.cos(math.pi * progress))
  else:
    decays = images / (recipe.num_samples_per_decay or recipe.num_epochs_per_decay * num_samples)
    if recipe.staircase:
      decays = tf.floor(decays)
    rate = highest * tf.cast(recipe.learning_rate_decay_factor, tf.float64)**decays
  rate = tf.maximum(rate, lowest)
  if recipe.warmup_epochs:
    rate *= tf.minimum((images + batch_size) / (recipe.warmup_epochs * num_samples), 1.0)
  return tf.cast(rate, tf.float32)


def build_optimizer(recipe, learning_rate):
  """Returns the tf.train.Optimizer of a recipe.

  Args:
    recipe: a Recipe.
    learning_rate: float32 [].
  """
  adam_options = (learning_rate, recipe.adam_beta1, recipe.adam_beta2, recipe.opt_epsilon)
  if recipe.optimizer == 'adam':
    return tf.train.AdamOptimizer(*adam_options)
  if recipe.optimizer == 'adamw':
    return AdamWOptimizer(*adam_options, recipe.weight_decay)
  if recipe.optimizer == 'rmsprop':
    return tf.train.RMSPropOptimizer(learning_rate, recipe.rmsprop_decay, recipe.momentum,
                                     recipe.opt_epsilon)
  return tf.train.MomentumOptimizer(learning_rate, recipe.momentum,
                                    use_nesterov=recipe.nesterov)


def l2_weight_decay(recipe):
  """Returns the factor of the kernels' L2 loss: 0 for adamw, which decays them itself."""
  return 0.0 if recipe.optimizer == 'adamw' else recipe.weight_decay


class AdamWOptimizer(tf.train.AdamOptimizer):
  """Adam with decoupled weight decay (Loshchilov & Hutter, 2019).

  Before Adam's update, kernels, but not biases and batch norms, are multiplied
  by 1 - learning_rate * weight_decay.
  """

  def __init__(self, learning_rate, beta1, beta2, epsilon, weight_decay):
    super().__init__(learning_rate, beta1, beta2, epsilon, name='AdamW')
    self._weight_decay = weight_decay

  def _resource_apply_dense(self, grad, var):
    if not var.op.name.endswith('weights'):  # as slim calls kernels of every kind
      return super()._resource_apply_dense(grad, var)
    decay = var.assign_sub(self._lr_t * self._weight_decay * var)
    with tf.control_dependencies([decay]):
      return super()._resource_apply_dense(grad, var)


def clip_gradients(gradients, norm, largest_norm):
  """Scales gradients down to a global norm.

  Args:
    gradients: list of (gradient, variable) pairs.
    norm: float32 [], their global norm.
    largest_norm: float, the limit; 0 does not clip.

  Returns:
    List of (gradient, variable) pairs.
  """
  if not largest_norm:
    return gradients
  tensors, variables = zip(*gradients)
  clipped, _ = tf.clip_by_global_norm(tensors, largest_norm, use_norm=norm)
  return list(zip(clipped, variables))


def balanced_class_weights(counts):
  """Returns class weights that give every class the same total weight.

  Args:
    counts: number of images of each class, a list of ints greater than 0.

  Returns:
    List of floats, images / (classes * images of the class); their mean over
    the images is 1.
  """
  return [sum(counts) / (len(counts) * count) for count in counts]
