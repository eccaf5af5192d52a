from mlx_qlora.model.backend import preload_blas

preload_blas()
