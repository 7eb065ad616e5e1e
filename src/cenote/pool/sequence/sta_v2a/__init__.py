"""STA-V2A: what a silent video tells a model that makes its sound."""
