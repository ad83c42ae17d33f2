// What the playground computes of vectors. Knows no page: the tests run it under node.

/** The numbers of base64, little-endian float32. */
function decodeVector(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
}

/** N vectors of length 1 -> N x N cosines. */
function cosines(vectors) {
  return vectors.map((a) =>
    vectors.map((b) => {
      let sum = 0;
      for (let i = 0; i < a.length; i += 1) sum += a[i] * b[i];
      return sum;
    }),
  );
}

/** Places from the highest score to the lowest; equal ones in their order. */
function ranking(scores) {
  return scores.map((_, place) => place).sort((a, b) => scores[b] - scores[a] || a - b);
}

/** N x N cosines -> N points on the two principal axes of the vectors, and the axes' shares of all
 * variance. Products of centred vectors follow from the cosines: no vector is needed. */
function principalMap(products) {
  const count = products.length;
  const rows = products.map((row) => row.reduce((a, b) => a + b, 0) / count);
  const mean = rows.reduce((a, b) => a + b, 0) / count;
  const centred = products.map((row, i) => row.map((x, j) => x - rows[i] - rows[j] + mean));
  const { values, vectors } = eigen(centred);
  const order = ranking(values).slice(0, 2);
  const total = values.reduce((a, b) => a + Math.max(b, 0), 0);
  const axes = order.map((k) => {
    const spread = Math.sqrt(Math.max(values[k], 0));
    const axis = vectors.map((row) => row[k] * spread);
    const far = axis.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a), 0);
    return far < 0 ? axis.map((x) => -x) : axis; // either sign is right: always the same one
  });
  return {
    points: products.map((_, i) => [axes[0][i], axes.length > 1 ? axes[1][i] : 0]),
    shares: order.map((k) => (total > 1e-12 ? Math.max(values[k], 0) / total : 0)),
  };
}

/** Eigenvalues of a symmetric matrix, and its eigenvectors as columns (Jacobi's rotations). */
function eigen(symmetric) {
  const a = symmetric.map((row) => [...row]);
  const count = a.length;
  const vectors = a.map((_, i) => a.map((_, j) => (i === j ? 1 : 0)));
  for (let sweep = 0; sweep < 60; sweep += 1) {
    let rest = 0;
    for (let p = 0; p < count; p += 1)
      for (let q = p + 1; q < count; q += 1) rest += a[p][q] * a[p][q];
    if (rest < 1e-22) break;
    for (let p = 0; p < count; p += 1)
      for (let q = p + 1; q < count; q += 1) rotate(a, vectors, p, q);
  }
  return { values: a.map((row, i) => row[i]), vectors };
}

/** Turn axes p and q so that a[p][q] becomes 0. */
function rotate(a, vectors, p, q) {
  if (Math.abs(a[p][q]) < 1e-300) return;
  const slope = (a[q][q] - a[p][p]) / (2 * a[p][q]);
  const tangent = (slope < 0 ? -1 : 1) / (Math.abs(slope) + Math.hypot(slope, 1));
  const cosine = 1 / Math.hypot(tangent, 1);
  const sine = tangent * cosine;
  const turn = (row) => {
    [row[p], row[q]] = [cosine * row[p] - sine * row[q], sine * row[p] + cosine * row[q]];
  };
  a.forEach(turn);
  const [first, second] = [a[p], a[q]];
  a[p] = first.map((x, i) => cosine * x - sine * second[i]);
  a[q] = first.map((x, i) => sine * x + cosine * second[i]);
  vectors.forEach(turn);
}

// From low to high; even steps in lightness, so that it reads without its hues, too.
const HEAT = [
  [12, 29, 74],
  [31, 80, 132],
  [33, 131, 141],
  [108, 184, 118],
  [250, 224, 110],
];

/** 0 to 1 -> the colour of a cell, and that of the text on it (whichever has more contrast). */
function heatColours(share) {
  const place = Math.min(Math.max(share, 0), 1) * (HEAT.length - 1);
  const low = Math.min(Math.floor(place), HEAT.length - 2);
  const colour = HEAT[low].map((x, i) => Math.round(x + (HEAT[low + 1][i] - x) * (place - low)));
  const light = luminance(colour);
  const onBlack = (light + 0.05) / 0.05;
  const onWhite = 1.05 / (light + 0.05);
  return { background: `rgb(${colour.join(", ")})`, ink: onBlack > onWhite ? "#000" : "#fff" };
}

/** WCAG's relative luminance of [R, G, B]. */
function luminance(colour) {
  const [r, g, b] = colour.map((x) => {
    const part = x / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/** The share of each value between the least and the most: what the heat map shows as a colour. */
function scale(values) {
  const least = Math.min(...values);
  const span = Math.max(...values) - least;
  return (value) => (span > 0 ? (value - least) / span : 1);
}
