"""Random access to the records of TFRecord files, with verified checksums.

TensorFlow's own readers stop at the first damaged record of a file and know
neither how many records a file holds nor where they are. A TFRecord file is a
sequence of

  uint64 length, uint32 CRC of the length, data, uint32 CRC of the data

in little-endian order. Each CRC is a CRC-32C, rotated and offset ("masked") as
TensorFlow's record_writer.h describes.
"""

import struct

import google_crc32c
import numpy as np

HEADER_SIZE = 12  # bytes
FOOTER_SIZE = 4  # bytes
CRC_MASK_DELTA = 0xa282ead8
GZIP = b'\x1f\x8b'  # the first bytes of a gzip file


class RecordError(Exception):
  """A record that cannot be used; the message says why."""


class Records:
  """The records of TFRecord files, numbered from 0 across the files.

  Construction reads only the record headers, a few microseconds each, so that the
  start-up time of training does not depend on the size of the images.

  Attributes:
    paths: paths of the files.
    damages: one sentence for each file whose last records are lost.
  """

  def __init__(self, paths):
    self.paths = list(paths)
    self.damages = []
    self._first = []  # number of each file's first record
    offsets, lengths = [], []
    for path in self.paths:
      self._first.append(len(offsets))
      self._index_file(path, offsets, lengths)
    self._offsets = np.array(offsets, np.int64)
    self._lengths = np.array(lengths, np.int64)

  def __len__(self):
    return len(self._offsets)

  def __getitem__(self, number):
    """Returns the bytes of a record; raises RecordError if they are damaged."""
    path, _ = self.locate(number)
    length = int(self._lengths[number])
    try:
      with open(path, 'rb', buffering=0) as f:
        f.seek(self._offsets[number] + HEADER_SIZE)
        content = f.read(length + FOOTER_SIZE)
    except OSError as error:
      raise RecordError(f'the file cannot be read: {error.strerror}') from error
    data = content[:length]
    if len(content) != length + FOOTER_SIZE or masked_crc(data) != _uint32(content, length):
      raise RecordError('its checksum is wrong: the file is damaged')
    return data

  def fingerprint(self):
    """Returns a string of the number of records and a hash of their lengths."""
    return f'{len(self)}, {masked_crc(self._lengths.tobytes()):08x}'

  def locate(self, number):
    """Returns the path of a record's file and the record's number within that file."""
    file = int(np.searchsorted(self._first, number, side='right')) - 1
    return self.paths[file], int(number) - self._first[file]

  def _index_file(self, path, offsets, lengths):
    first = len(offsets)
    with open(path, 'rb', buffering=0) as f:
      size = f.seek(0, 2)
      offset = 0
      while offset < size:
        f.seek(offset)
        header = f.read(HEADER_SIZE)
        if len(header) == HEADER_SIZE and masked_crc(header[:8]) != _uint32(header, 8):
          self.damages.append(
              f'{path}: the length of record {len(offsets) - first} is damaged: that record and '
              'all after it are lost' if offset else
              f'{path} is compressed: unpack it with gzip -d' if header.startswith(GZIP) else
              f'{path} is not a TFRecord file, or it is compressed')
          return
        end = offset + HEADER_SIZE + FOOTER_SIZE
        if len(header) == HEADER_SIZE:
          end += struct.unpack_from('<Q', header)[0]
        if len(header) < HEADER_SIZE or end > size:
          self.damages.append(f'{path} ends inside record {len(offsets) - first}, which is lost')
          return
        offsets.append(offset)
        lengths.append(end - offset - HEADER_SIZE - FOOTER_SIZE)
        offset = end


def masked_crc(data):
  """Returns the masked CRC-32C of bytes, a uint32."""
  crc = google_crc32c.value(data)
  return ((crc >> 15 | crc << 17) + CRC_MASK_DELTA) & 0xffffffff


def _uint32(content, offset):
  return struct.unpack_from('<I', content, offset)[0]
