"""Write a wheel into the working directory; it needs no build backend."""

import zipfile

METADATA = "greeting-1.dist-info"
with zipfile.ZipFile("greeting-1-py3-none-any.whl", "w") as wheel:
    wheel.writestr("greeting/__init__.py", "TEXT = 'installed and imported'\n")
    wheel.writestr(f"{METADATA}/METADATA", "Metadata-Version: 2.1\nName: greeting\nVersion: 1\n")
    wheel.writestr(f"{METADATA}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr(f"{METADATA}/RECORD", "")
