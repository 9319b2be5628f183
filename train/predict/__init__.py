"""Prediction over shards, films and tile images.

In: a classifier or backbone checkpoint and tiles, with the decoding and normalisation that training used. Out: tables of
tiles, images and breasts, JSON, heat maps and contact sheets. Work is cut into parts that are kept when finished, so an
interrupted prediction resumes; a tile or film that cannot be read becomes a row with its reason.
"""
