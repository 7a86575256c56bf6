"""From encoded images to batches of pixels, safely, in processes of their own."""
