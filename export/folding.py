"""Folds the batch norms of a frozen graph into the convolutions in front of them.

At inference a batch norm multiplies each channel by one constant and adds another.
A convolution can do both: its kernel takes the factor, and a bias the rest.

  graph_def = batch_norm_folding.fold(graph_def, 'output')

Numpy does the arithmetic, in float64; nothing is run.
"""

import collections

import numpy as np
import tensorflow.compat.v1 as tf

NORM_OPS = ('FusedBatchNorm', 'FusedBatchNormV2', 'FusedBatchNormV3')
CONVOLUTION_OPS = ('Conv2D', 'DepthwiseConv2dNative')


def fold(graph_def, output_name):
  """Folds batch norms, drops Identity nodes, and sorts what the output needs.

  A norm stays as it is where it cannot be folded: in training mode, with
  parameters that are no constants, or behind anything but a convolution (or a
  convolution and its bias) that feeds nothing else.

  Args:
    graph_def: frozen tf.GraphDef without control inputs; it is not changed.
    output_name: name of the node that is wanted.

  Returns:
    A tf.GraphDef that computes the same to float rounding: the nodes that the
    output depends on, each behind its inputs. What a name of the old graph
    stands for in the new one has the same value, kernels excepted.

  Raises:
    ValueError: the graph has no such node, or a control input.
  """
  nodes = {node.name: tf.NodeDef.FromString(node.SerializeToString())
           for node in graph_def.node}
  if output_name not in nodes:
    raise ValueError(f'The graph has no node {output_name!r}')
  for node in nodes.values():
    if any(tensor.startswith('^') for tensor in node.input):
      raise ValueError(f'{node.name!r} has a control input: folding would change when it runs')
  nodes = _without_identities(nodes, output_name)
  num_uses = _count_uses(nodes)
  for node in _sorted_nodes(nodes, output_name):
    if node.op in NORM_OPS:
      _fold_norm(nodes, node, num_uses)
  return _graph_of(nodes, output_name, graph_def)


def delay_biases(graph_def, output_name):
  """Moves biases from in front of max pools and sums behind them; two of a sum become one.

  Under tf.function, TensorFlow 2.21's remapper fails on a convolution's BiasAdd
  in front of a residual sum ("fanout ... exist for missing node"), and then
  fuses nothing at all. OpenCV in turn adds a bias to a convolution only: this
  is for graphs that TensorFlow runs.

  Args:
    graph_def: tf.GraphDef from `fold`; it is not changed.
    output_name: name of the node that is wanted.

  Returns:
    A tf.GraphDef, as from `fold`.
  """
  nodes = {node.name: tf.NodeDef.FromString(node.SerializeToString())
           for node in graph_def.node}
  num_uses = _count_uses(nodes)
  for node in _sorted_nodes(nodes, output_name):
    if node.op in ('MaxPool', 'Add', 'AddV2'):
      _delay_biases_of(nodes, node, num_uses)
  return _graph_of(nodes, output_name, graph_def)


def num_norms(graph_def):
  """Returns how many batch norms a graph has."""
  return sum(node.op in NORM_OPS for node in graph_def.node)


def _without_identities(nodes, output_name):
  """Connects the consumers of every Identity with the node that it repeats."""
  def source(tensor):
    tensor = tensor.removesuffix(':0')
    while tensor in nodes and nodes[tensor].op == 'Identity':
      tensor = nodes[tensor].input[0].removesuffix(':0')
    return tensor

  kept = {name: node for name, node in nodes.items() if node.op != 'Identity'}
  last_name = source(output_name)
  kept[output_name] = kept.pop(last_name)
  kept[output_name].name = output_name
  for node in kept.values():
    tensors = map(source, node.input)
    node.input[:] = [output_name if tensor == last_name else tensor for tensor in tensors]
  return kept


def _node_name(tensor):
  return tensor.partition(':')[0]


def _count_uses(nodes):
  return collections.Counter(
      _node_name(tensor) for node in nodes.values() for tensor in node.input)


def _fold_norm(nodes, norm, num_uses):
  """Replaces a norm by a bias under its name, and its convolution's kernel; or does nothing."""
  if norm.attr['is_training'].b:
    return
  parameters = [_constant(nodes, tensor) for tensor in norm.input[1:]]
  convolution = nodes[_node_name(norm.input[0])]
  old_bias = np.zeros([])
  if convolution.op == 'BiasAdd' and num_uses[convolution.name] == 1:
    old_bias = _constant(nodes, convolution.input[1])
    convolution = nodes[_node_name(convolution.input[0])]
  if convolution.op not in CONVOLUTION_OPS or num_uses[convolution.name] != 1:
    return
  kernel = _constant(nodes, convolution.input[1])
  if any(constant is None for constant in (*parameters, old_bias, kernel)):
    return

  gamma, beta, mean, variance = (parameter.astype(np.float64) for parameter in parameters)
  scale = gamma / np.sqrt(variance + norm.attr['epsilon'].f)
  bias = beta + (old_bias.astype(np.float64) - mean) * scale
  if convolution.op == 'DepthwiseConv2dNative':
    # Output channel i * multiplier + j comes from kernel[:, :, i, j].
    scale = scale.reshape(kernel.shape[2:])
  convolution.input[1] = _add_constant(
      nodes, f'{convolution.name}/folded_kernel', (kernel * scale).astype(kernel.dtype))
  _add_bias(nodes, norm.name, convolution.name, bias.astype(kernel.dtype),
            norm.attr['data_format'])


def _delay_biases_of(nodes, node, num_uses):
  tensors, values = [], []
  for tensor in node.input:
    source = nodes[_node_name(tensor)]
    value = _constant(nodes, source.input[1]) if source.op == 'BiasAdd' else None
    if value is None or num_uses[source.name] != 1:
      tensors.append(tensor)
    else:
      tensors.append(source.input[0])
      values.append(value)
      data_format = source.attr['data_format']
  if values:
    # The biased result goes by the old name: whoever reads it need not change.
    name, node.name = node.name, f'{node.name}/unbiased'
    node.input[:] = tensors
    nodes[node.name] = node
    _add_bias(nodes, name, node.name, sum(values), data_format)


def _constant(nodes, tensor):
  """Returns the value of a constant, None of anything else."""
  node = nodes.get(tensor)
  return tf.make_ndarray(node.attr['value'].tensor) if node and node.op == 'Const' else None


def _add_constant(nodes, name, value):
  nodes[name] = tf.NodeDef(name=name, op='Const', attr={
      'dtype': tf.AttrValue(type=tf.as_dtype(value.dtype).as_datatype_enum),
      'value': tf.AttrValue(tensor=tf.make_tensor_proto(value))})
  return name


def _add_bias(nodes, name, tensor, bias, data_format):
  nodes[name] = tf.NodeDef(
      name=name, op='BiasAdd', input=[tensor, _add_constant(nodes, f'{name}/folded_bias', bias)],
      attr={'T': tf.AttrValue(type=tf.as_dtype(bias.dtype).as_datatype_enum),
            'data_format': data_format})


def _graph_of(nodes, output_name, old_graph_def):
  graph_def = tf.GraphDef(versions=old_graph_def.versions, library=old_graph_def.library)
  graph_def.node.extend(_sorted_nodes(nodes, output_name))
  return graph_def


def _sorted_nodes(nodes, output_name):
  """Returns the nodes that the output depends on, each behind its inputs."""
  done = {}
  stack = [output_name]
  while stack:
    name = stack[-1]
    waiting = [source for source in map(_node_name, nodes[name].input) if source not in done]
    if waiting:
      stack.extend(reversed(waiting))
    else:
      done.setdefault(name, nodes[name])
      stack.pop()
  return list(done.values())
