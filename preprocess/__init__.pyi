from .reading import ReadingConfig as ReadingConfig
from .reading import read_header as read_header
from .reading import read_mammogram as read_mammogram
from .segmentation import segment_breast as segment_breast
from .selection import select_tiles as select_tiles
from .simulation import plant_clusters as plant_clusters
from .tiling import TilingConfig as TilingConfig
from .tiling import tile_film as tile_film
