"""`truststore.py FILE`: the roots of SSL_CERT_FILE as a Java trust store without a password."""

import os
import pathlib
import sys
import warnings

from cryptography import x509
from cryptography.hazmat.primitives.serialization import NoEncryption, pkcs12

warnings.simplefilter("ignore")  # some system roots have serial numbers that RFC 5280 forbids
roots = x509.load_pem_x509_certificates(pathlib.Path(os.environ["SSL_CERT_FILE"]).read_bytes())
entries = [pkcs12.PKCS12Certificate(root, str(number).encode()) for number, root in enumerate(roots)]
pathlib.Path(sys.argv[1]).write_bytes(pkcs12.serialize_java_truststore(entries, NoEncryption()))
