// Show the passage of a citation. The browser's own jump would reload a page whose address has a query.
element.addEventListener('click', (event) => {
  const link = event.target.closest('a.core-cite');
  if (!link) return;
  event.preventDefault();
  const card = document.getElementById(link.getAttribute('href').slice(1));
  if (!card) return;
  const folded = card.closest('details');
  if (folded) folded.open = true;
  card.scrollIntoView({block: 'center', behavior: 'smooth'});
  card.focus({preventScroll: true});
});
