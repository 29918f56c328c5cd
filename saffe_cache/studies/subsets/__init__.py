"""Items of several media that are fused into one vector, with any of the media missing."""
