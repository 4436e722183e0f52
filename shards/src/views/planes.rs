//! The planar image that operations work on.

/// Bytes behind a plane: a vector of so many may begin at any pixel.
const ROOM: usize = 32;

/// A picture by channel, `[3, height, width]`: neighbours along a row are adjacent, neighbours along a
/// column a row apart, and every loop runs over contiguous bytes of one meaning.
///
/// Its memory never shrinks: a picture that gets another size holds whatever was there.
#[derive(Debug, Default)]
pub(super) struct Planes {
    bytes: Vec<u8>,
    width: usize,
    height: usize,
    /// From a plane to the next: its pixels, filled up to whole vectors, and [`ROOM`].
    pitch: usize,
    /// The picture is gray: only the first plane is valid, and stands for all three.
    gray: bool,
}

impl Planes {
    /// Another size, in colour. The pixels are not set.
    pub(super) fn reshape(&mut self, width: usize, height: usize) {
        let pitch = (width * height).next_multiple_of(ROOM) + ROOM;
        if self.bytes.len() < 3 * pitch {
            self.bytes.resize(3 * pitch, 0);
        }
        (self.width, self.height, self.pitch, self.gray) = (width, height, pitch, false);
    }

    pub(super) fn width(&self) -> usize {
        self.width
    }

    pub(super) fn height(&self) -> usize {
        self.height
    }

    pub(super) fn pixels(&self) -> usize {
        self.width * self.height
    }

    /// Whether the first plane stands for all three.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn is_gray(&self) -> bool {
        self.gray
    }

    /// Lets the first plane stand for all three.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn set_gray(&mut self) {
        self.gray = true;
    }

    /// Copies the first plane to the others where it stands for them.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn spread(&mut self) {
        if std::mem::take(&mut self.gray) {
            let (first, others) = self.bytes[..3 * self.pitch].split_at_mut(self.pitch);
            others.chunks_exact_mut(self.pitch).for_each(|plane| plane.copy_from_slice(first));
        }
    }

    /// The planes' pixels.
    #[inline(always)]
    pub(super) fn planes(&mut self) -> [&mut [u8]; 3] {
        let pixels = self.pixels();
        self.padded().map(|plane| &mut plane[..pixels])
    }

    /// The planes and the room behind them: whole vectors.
    #[inline(always)]
    pub(super) fn padded(&mut self) -> [&mut [u8]; 3] {
        let (red, others) = self.bytes[..3 * self.pitch].split_at_mut(self.pitch);
        let (green, blue) = others.split_at_mut(self.pitch);
        [red, green, blue]
    }

    /// From a row's first pixel to the end of the room, to write to.
    #[inline(always)]
    pub(super) fn row_on(&mut self, y: usize) -> [&mut [u8]; 3] {
        let at = y * self.width;
        self.padded().map(|plane| &mut plane[at..])
    }

    /// A row's channels; of a gray picture three times the same.
    #[inline(always)]
    pub(super) fn row(&self, y: usize) -> [&[u8]; 3] {
        [0, 1, 2].map(|channel| {
            let plane = if self.gray { 0 } else { channel };
            &self.bytes[plane * self.pitch + y * self.width..][..self.width]
        })
    }

    /// Becomes the box `[left, top, width, height]` of another picture.
    #[inline(always)]
    pub(super) fn cut(&mut self, from: &Planes, [left, top, width, height]: [usize; 4]) {
        self.reshape(width, height);
        let (source, target) = (from.pitch, self.pitch);
        for channel in 0..if from.gray { 1 } else { 3 } {
            for y in 0..height {
                // Whole vectors: what they write too much is overwritten with the next row, or room.
                let from = &from.bytes[channel * source + (top + y) * from.width + left..];
                let to = &mut self.bytes[channel * target + y * width..];
                let whole = width.next_multiple_of(ROOM);
                let (from, _) = from[..whole].as_chunks::<ROOM>();
                let (to, _) = to[..whole].as_chunks_mut::<ROOM>();
                for (to, from) in to.iter_mut().zip(from) {
                    *to = *from;
                }
            }
        }
        self.gray = from.gray;
    }
}
