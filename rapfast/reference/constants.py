"""Every threshold of the reference, in one place. docs/numerics.md says where each comes from."""

TILE = 16  # pixels; side of a tile
ALPHA_CUT = 1 / 255  # a contribution below one 8-bit grey level is skipped
ALPHA_CAP = 0.999  # keeps 1 / (1 - alpha) finite in a backward pass
T_STOP = 1e-4  # a pixel stops before the Gaussian that would leave this little light
MAX_EXTEND = 3.33  # standard deviations; exp(-3.33^2 / 2) is just below 1/255
FOV_MARGIN = 0.3  # of tan(fov / 2): how far outside the image the Jacobian still follows the mean
FISHEYE_EPS = 1e-7  # keeps theta / r defined on the optical axis
ED_MIN_ALPHA = 1e-10  # expected depth divides by at least this
BLEND_CHUNK = 256  # Gaussians of a tile evaluated at once: bounds memory, changes no decision
INT32_MAX = 2**31 - 1
