"""Objects in photographs: the 80 classes of COCO, the words for them, and where a text names one."""
