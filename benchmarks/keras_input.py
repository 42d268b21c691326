"""Prints the images per second of Keras' image_dataset_from_directory with distortions."""

import sys
import time

import keras
import tensorflow as tf

folder, image_size, batch_size, warm_up, num_batches = sys.argv[1], *map(int, sys.argv[2:])
larger = round(image_size / 0.875)
layers = keras.Sequential([
    keras.layers.RandomCrop(image_size, image_size), keras.layers.RandomFlip('horizontal'),
    keras.layers.RandomBrightness(32 / 255), keras.layers.RandomSaturation(0.5),
    keras.layers.Rescaling(1 / 127.5, -1)])
dataset = keras.utils.image_dataset_from_directory(
    folder, image_size=(larger, larger), batch_size=batch_size, verbose=False)
dataset = dataset.repeat().map(
    lambda images, labels: (layers(images, training=True), labels), tf.data.AUTOTUNE)
batches = iter(dataset.prefetch(tf.data.AUTOTUNE))
for _ in range(warm_up):
  next(batches)
start = time.perf_counter()
for _ in range(num_batches):
  next(batches)
print(num_batches * batch_size / (time.perf_counter() - start))
