"""What is done to valid files: bits, lengths and parts of any, and the fields of JSON, safetensors, NumPy and PNG.

All take their chances from a `random.Random`, so that the same seed, or the same hypothesis example, gives the same.
"""

import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

NUMBERS = (
  0,
  1,
  -1,
  2,
  255,
  256,
  2**15,
  2**31 - 1,
  2**31,
  2**32 - 1,
  2**32,
  2**53,
  2**63 - 1,
  2**63,
  2**64 - 1,
  10**400,
)
TEXTS = (
  '', ' ', '.', '..', '../../escaped', '/tmp/escaped', 'a' * 5000, 'é', '\ud800', '\x1b[31m', 'a\nb', '\0', 'O', '|O',
  'object', 'NaN', '1e999', '__class__', 'float64', '<f8', 'U', 'V9',
)  # fmt: skip
VALUES = (
  *NUMBERS,
  *TEXTS,
  None,
  True,
  False,
  0.5,
  1e308,
  float('nan'),
  float('inf'),
  [],
  {},
  [[]],
  [2**62] * 4,
  {'a': 1},
)

Edit = Callable[[random.Random, bytes], bytes]


def flip(rng: random.Random, data: bytes) -> bytes:
  """Some bits, in one region or all over."""
  if not data:
    return data
  changed = bytearray(data)
  start = rng.randrange(len(data))
  end = min(len(data), start + 64) if rng.random() < 0.5 else len(data)
  for _ in range(rng.choice((1, 1, 2, 8, 64))):
    changed[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
  return bytes(changed)


def head(rng: random.Random, data: bytes) -> bytes:
  """Bytes among the first 128, where formats say what follows."""
  changed = bytearray(data)
  for _ in range(rng.choice((1, 2, 4))):
    if changed:
      changed[rng.randrange(min(128, len(changed)))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
  return bytes(changed)


def number(rng: random.Random, data: bytes) -> bytes:
  """A binary integer that says something enormous, or nothing."""
  form = rng.choice(('<H', '>H', '<I', '>I', '<Q', '>Q'))
  size = struct.calcsize(form)
  at = rng.randrange(max(1, len(data) - size + 1))
  value = rng.choice(NUMBERS) & (256**size - 1)
  return data[:at] + struct.pack(form, value) + data[at + size :]


def digits(rng: random.Random, data: bytes) -> bytes:
  """A number in text."""
  places = [i for i, byte in enumerate(data[:100_000]) if 48 <= byte < 58]
  if not places:
    return flip(rng, data)
  at = rng.choice(places)
  return data[:at] + str(rng.choice(NUMBERS)).encode() + data[at + 1 :]


def cut(rng: random.Random, data: bytes) -> bytes:
  """The beginning, or the end, alone."""
  at = rng.randrange(len(data) + 1)
  return data[:at] if rng.random() < 0.8 else data[at:]


def splice(rng: random.Random, data: bytes) -> bytes:
  """A part doubled, left out, moved, zeroed or made enormous."""
  a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
  part = data[a:b]
  return rng.choice(
    (
      data[:b] + part + data[b:],
      data[:a] + data[b:],
      data[b:] + part + data[:a],
      data[:a] + bytes(len(part)) + data[b:],
      data[:a] + part[:8] * 5000 + data[b:],
    )
  )


def noise(rng: random.Random, data: bytes) -> bytes:
  """Random bytes, alone or behind the first of the file."""
  kept = data[: rng.choice((0, 4, 16, 64))]
  return kept + rng.randbytes(rng.choice((0, 1, 7, 64, 4096)))


def text(rng: random.Random, data: bytes) -> bytes:
  """Something odd put among text."""
  odd = rng.choice((b'\xff', b'\0', b'\r', b'"', b'\xef\xbb\xbf', b'\xff\xfe', b'[' * 3000, b'{"a":' * 3000, b'\n\n',
                    b'#', *(t.encode('utf-8', 'surrogatepass') for t in TEXTS)))  # fmt: skip
  at = rng.randrange(len(data) + 1)
  return data[:at] + odd + data[at + rng.choice((0, 1, len(odd))) :]


ANY: tuple[Edit, ...] = (flip, head, number, digits, cut, splice, noise)


def change_value(rng: random.Random, value: Any) -> Any:
  """A JSON value with one thing in it replaced, left out, added or renamed."""
  if isinstance(value, dict) and value and rng.random() < 0.9:
    key = rng.choice(list(value))
    what = rng.random()
    if what < 0.1:
      return {k: v for k, v in value.items() if k != key}
    if what < 0.2:
      return {(rng.choice(TEXTS) if k == key else k): v for k, v in value.items()}
    if what < 0.25:
      return {**value, rng.choice(TEXTS): rng.choice(VALUES)}
    return {**value, key: change_value(rng, value[key])}
  if isinstance(value, list) and value and rng.random() < 0.8:
    at = rng.randrange(len(value))
    what = rng.random()
    if what < 0.1:
      return value[:at] + value[at + 1 :]
    if what < 0.2:
      return [*value, rng.choice(VALUES)]
    return [*value[:at], change_value(rng, value[at]), *value[at + 1 :]]
  if rng.random() < 0.1:
    return nested(rng.choice((20, 200, 900)), value)
  return rng.choice(VALUES)


def nested(depth: int, value: Any) -> Any:
  """A value in so many lists."""
  for _ in range(depth):
    value = [value]
  return value


def in_json(rng: random.Random, data: bytes) -> bytes:
  """A field of JSON."""
  try:
    value = json.loads(data)
  except (ValueError, RecursionError):
    return text(rng, data)
  return json.dumps(change_value(rng, value)).encode()


def in_safetensors(rng: random.Random, data: bytes) -> bytes:
  """A field of the header, or of the configuration in it, with the length made to fit."""
  size = struct.unpack('<Q', data[:8])[0]
  header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
  if rng.random() < 0.6:
    config = change_value(rng, json.loads(header['__metadata__']['config']))
    header['__metadata__']['config'] = json.dumps(config)
  else:
    header = change_value(rng, header)
  changed = json.dumps(header, ensure_ascii=rng.random() < 0.8).encode('utf-8', 'surrogatepass')
  return struct.pack('<Q', len(changed)) + changed + rest


def in_numpy(rng: random.Random, data: bytes) -> bytes:
  """The header of a .npy file, with the length made to fit."""
  size = struct.unpack('<H', data[8:10])[0]
  descr = rng.choice(("'|u1'", "'|O'", "'<f8'", "'|V1'", "[('a', '|u1')]", "'|u1', 'descr': '|O'", '"' * 9, '(' * 3000))
  shape = rng.choice(('(4, 8, 8, 3)', f'({2**62}, 8, 8, 3)', f'({10**30}, 8, 8, 3)', '(-1, 8, 8, 3)', '()', '(4,)',
                      'None', f'({2**40}, 8, 8, 3)', '(0, 8, 8, 3)', '[4, 8, 8, 3]', '(4, 8, 8, True)'))  # fmt: skip
  header = f"{{'descr': {descr}, 'fortran_order': {rng.choice(('False', 'True', '0'))}, 'shape': {shape}, }}\n".encode()
  return (
    data[:6] + bytes([rng.choice((1, 1, 1, 2, 9)), 0]) + struct.pack('<H', len(header)) + header + data[10 + size :]
  )


def in_png(rng: random.Random, data: bytes) -> bytes:
  """A PNG file's chunk, with its checksum made to fit."""
  chunks, at = [], 8
  while at + 12 <= len(data):
    size = struct.unpack('>I', data[at : at + 4])[0]
    chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
    at += 12 + size
  i = rng.randrange(len(chunks))
  kind, body = chunks[i]
  what = rng.random()
  if what < 0.6:
    chunks[i] = kind, rng.choice(ANY)(rng, body)
  elif what < 0.8:
    kind = rng.choice(
      (b'IHDR', b'PLTE', b'tRNS', b'iCCP', b'zTXt', b'iTXt', b'eXIf', b'acTL', b'fcTL', b'fdAT', b'IDAT')
    )
    chunks.insert(
      i, (kind, rng.choice((body, zlib.compress(bytes(1_000_000)), b'a\0\0' + zlib.compress(bytes(1_000_000)))))
    )
  else:
    del chunks[i]
  parts = (struct.pack('>I', len(b)) + k + b + struct.pack('>I', zlib.crc32(k + b)) for k, b in chunks)
  return data[:8] + b''.join(parts)
