"Whether `lsuv_` is right on the architectures people use: `python tests/conformance` runs it on all of them."
