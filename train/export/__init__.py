"""A trained network as an ONNX file.

In: a checkpoint. Out: the ONNX file, which is compared with torch before it gets its name. Needs the extra ``onnx``.
"""
